"""How well a language model predicts text: perplexity and accuracy, the standard ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.pretrained import Objective
from fiftyfold.modules.text_module import IGNORED_LABEL, predicted_positions, text_inputs

Progress = Callable[[int, int], None]
"""Called with the batches done and their number."""


@dataclass(frozen=True)
class TextScore:
    """How well tokens were predicted.

    Attributes:
        nats: mean negative log-likelihood a token.
        accuracy: share of the tokens that the model thought likeliest.
        tokens: number of tokens that were predicted.
    """

    nats: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``."""
        return math.exp(min(self.nats, 700.0))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "nats": self.nats,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
        }


def score_row(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress = lambda *_: None,
) -> TextScore:
    """Score one long text with a causal model.

    The text is read in windows that end every ``stride`` tokens. Each token but the first is predicted exactly once, by
    the first window that holds it, so that after the first window it has at least ``window - stride`` tokens before it.
    A stride as long as the window is the quicker way, and gives a higher figure.

    Args:
        model: the model; read in evaluation mode.
        tokens: [tokens].
        window: tokens that the model sees at once.
        stride: new tokens a window; by default half a window.
        batch_size: windows at once.
        progress: told how far the work has come.

    Raises:
        FiftyfoldError: if the text is too short, or window and stride make no sense.
    """
    step = max(1, window // 2) if stride is None else stride
    if not 1 <= step <= window or window < 2:
        raise FiftyfoldError(f"a stride of {step} makes no sense with windows of {window} tokens.")
    if len(tokens) < 2:
        raise FiftyfoldError("a text of fewer than two tokens cannot be scored.")
    return _total(model, list(_windows(tokens, window, step)), "causal", batch_size, progress)


def score_documents(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    first_token: int | None,
    window: int,
    batch_size: int = 16,
    progress: Progress = lambda *_: None,
) -> TextScore:
    """Score documents with a causal model, each on its own; the mean goes over the tokens of all.

    A document longer than a window is read in windows that overlap by half.

    Args:
        model: the model; read in evaluation mode.
        documents: tokens without special ones, [tokens] each.
        first_token: put before each document, so that its first token is predicted as well; None for none.
        window: tokens that the model sees at once, ``first_token`` included.
        batch_size: windows at once.
        progress: told how far the work has come.

    Raises:
        FiftyfoldError: if there is nothing to score, or a window has no room for a token and its prediction.
    """
    if window < 2:
        raise FiftyfoldError(f"a window of {window} tokens predicts nothing; it takes at least 2.")
    first = torch.tensor([] if first_token is None else [first_token], dtype=torch.int64)
    rows = [torch.cat([first, document]) for document in documents]
    # Neighbours in length share a batch, which pads less.
    windows = [part for row in sorted(rows, key=len) if len(row) > 1 for part in _windows(row, window, window // 2)]
    if not windows:
        raise FiftyfoldError("there is no document of two tokens or more to score.")
    return _total(model, windows, "causal", batch_size, progress)


def score_masked(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    progress: Progress = lambda *_: None,
) -> TextScore:
    """Score a masked model on batches whose tokens are hidden already (``input_ids`` and ``labels``).

    This is the loss of its training. It is no probability of the text, so compare it only between models that read the
    same masks.
    """
    windows = [
        (row, label) for batch in batches for row, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    return _total(model, windows, "masked", len(batches[0]["input_ids"]), progress)


def _windows(tokens: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the windows of a row of tokens with their labels, -100 where an earlier window predicted the token."""
    predicted, end = 1, min(window, len(tokens))
    while predicted < len(tokens):
        begin = max(0, end - window)
        labels = tokens[begin:end].clone()
        labels[: predicted - begin] = IGNORED_LABEL
        yield tokens[begin:end], labels
        # The token before the next predicted one must be in its window.
        predicted, end = end, min(end + max(1, min(stride, window - 1)), len(tokens))


@torch.no_grad()
def _total(
    model: PreTrainedModel,
    windows: Sequence[tuple[Tensor, Tensor]],
    objective: Objective,
    batch_size: int,
    progress: Progress,
) -> TextScore:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, correct, count = 0.0, 0, 0
    batches = range(0, len(windows), batch_size)
    for number, start in enumerate(batches, start=1):
        batch = {name: tensor.to(device) for name, tensor in _padded(windows[start : start + batch_size]).items()}
        logits = model(**text_inputs(model, batch, objective)).logits
        logits, labels = predicted_positions(logits, batch["labels"], objective)
        nats += float(F.cross_entropy(logits.float(), labels, reduction="sum").double())
        correct += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
        progress(number, len(batches))
    model.train(training)
    if not math.isfinite(nats):
        raise FiftyfoldError("the model's predictions are not finite numbers, so it has no perplexity.")
    return TextScore(nats / count, correct / count, count)


def _padded(windows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(tokens) for tokens, _ in windows)
    inputs = torch.zeros(len(windows), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED_LABEL)
    mask = torch.zeros_like(inputs)
    for row, (tokens, own) in enumerate(windows):
        inputs[row, : len(tokens)], labels[row, : len(tokens)], mask[row, : len(tokens)] = tokens, own, 1
    if bool(mask.all()):
        return {"input_ids": inputs, "labels": labels}
    return {"input_ids": inputs, "labels": labels, "attention_mask": mask}
