"""Trimming a vocabulary: the tokens that given texts do not use leave the tokenizer and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.vocabulary.embeddings import check_embedding, configured_tokens, keep_rows
from fiftyfold.modules.vocabulary.tokenizer import check_trimmed, read_definition, trimmed_tokenizer
from fiftyfold.modules.vocabulary.tokens import encode_texts, needed_tokens

_TRIED, _TRIED_TOKENS = 8, 64


def trim_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Callable[[], Iterable[str]]
) -> PreTrainedTokenizerBase:
    """Take the tokens that texts do not use out of a model, in place, and out of its tokenizer.

    The texts are cut as before, and the model computes the same of them. A word in other texts that is no longer a
    token is cut into smaller pieces; single characters of the texts, ASCII's, and bytes are kept for that, as are
    special and added tokens. A language model can predict only what is left.

    Args:
        model: an encoder or decoder that nothing has compressed yet.
        tokenizer: the model's, a fast one; it stays as it is.
        texts: returns the texts anew each time that it is called.

    Returns:
        The trimmed tokenizer.

    Raises:
        FiftyfoldError: if there is no text, or the tokenizer or the model is of a kind that cannot be trimmed; the
            model is then as before.
    """
    rows = check_embedding(model).num_embeddings
    if len(tokenizer) > rows:
        raise FiftyfoldError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}; use the model's own.")
    definition = read_definition(tokenizer)
    tried = [torch.tensor([row[:_TRIED_TOKENS]]) for row in encode_texts(tokenizer, islice(texts(), _TRIED))]
    if not any(row.numel() for row in tried):
        raise FiftyfoldError("there is no text to find the needed tokens in.")
    needed = needed_tokens(tokenizer, definition, texts()) | configured_tokens(model)
    names = tokenizer.get_vocab().values()
    kept = sorted(needed & {*names})
    numbers = {number: place for place, number in enumerate(kept)}
    trimmed = trimmed_tokenizer(tokenizer, definition, numbers)
    check_trimmed(tokenizer, trimmed, numbers, texts(), texts())
    before = [_outputs(model, row) for row in tried]
    changes = keep_rows(model, numbers)
    try:
        after = [_outputs(model, row.clone().apply_(numbers.__getitem__)) for row in tried]
        same = all(_are_equal(model, *pair, kept) for pair in zip(before, after, strict=True))
    except (IndexError, RuntimeError):
        same = False
    if not same:
        changes.undo()
        raise FiftyfoldError(
            f"{type(model).__name__} computes something else with fewer tokens: more of it goes by their numbers than "
            "its embedding and output layer. Keep its whole vocabulary."
        )
    return trimmed


@torch.no_grad()
def _outputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    training = model.training
    outputs: Tensor = model.eval()(input_ids=tokens.to(model.device))[0]
    model.train(training)
    return outputs


def _are_equal(model: PreTrainedModel, before: Tensor, after: Tensor, kept: list[int]) -> bool:
    if model.get_output_embeddings() is not None:
        before = before[..., kept]
    return before.shape == after.shape and torch.allclose(before, after, rtol=1e-3, atol=1e-4)
