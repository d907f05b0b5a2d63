"""Trimming a vocabulary: the tokens that given texts do not use leave the tokenizer and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.vocabulary.embeddings import check_embedding, configured_tokens, keep_rows
from fiftyfold.modules.vocabulary.tokenizer import check_trimmed, named_tokens, read_definition, trimmed_tokenizer
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
    wanted = configured_tokens(model) | named_tokens(definition)
    count, tried = 0, list[list[int]]()
    for row in encode_texts(tokenizer, texts()):
        count += 1
        wanted.update(row)
        if row and len(tried) < _TRIED:
            tried.append(row[: _tried_length(model)])
    if not tried:
        raise FiftyfoldError("there is no text to find the needed tokens in.")
    kept = sorted(needed_tokens(tokenizer, definition, wanted))
    numbers = {number: place for place, number in enumerate(kept)}
    trimmed = trimmed_tokenizer(tokenizer, definition, numbers)
    if check_trimmed(tokenizer, trimmed, numbers, texts()) != count:
        raise FiftyfoldError("texts() gave other texts when called again; let it return all of them each time.")
    before = _outputs(model, tried, slice(None) if model.get_output_embeddings() is None else kept)
    changes = keep_rows(model, numbers)
    try:
        after = _outputs(model, [[numbers[number] for number in row] for row in tried], slice(None))
        same = all(map(_are_equal, before, after))
    except (IndexError, RuntimeError):
        same = False
    except BaseException:
        changes.undo()
        raise
    if not same:
        changes.undo()
        raise FiftyfoldError(
            f"{type(model).__name__} computes something else with fewer tokens: more of it goes by their numbers than "
            "its embedding and output layer. Keep its whole vocabulary."
        )
    return trimmed


def _tried_length(model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    # Not all: RoBERTa's first position is the third.
    return min(_TRIED_TOKENS, positions // 2) if isinstance(positions, int) else _TRIED_TOKENS


@torch.no_grad()
def _outputs(model: PreTrainedModel, rows: list[list[int]], columns: slice | list[int]) -> list[Tensor]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return [model(input_ids=torch.tensor([row], device=model.device))[0][..., columns] for row in rows]
    finally:
        for module, mode in modes.items():
            module.training = mode


def _are_equal(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return False
    # A product with fewer columns may sum in another order.
    tolerance = max(1e-4, 8 * torch.finfo(before.dtype).eps)
    return bool((before - after).abs().max() <= tolerance * before.abs().max())
