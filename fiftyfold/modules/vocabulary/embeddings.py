"""A model with the rows of some tokens: its embedding, its output layer, and the numbers in its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.structure import structure_log

_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
_SIZES = {"num_embeddings", "out_features"}
_TOKEN_SEQUENCES = ("bad_words_ids", "force_words_ids", "sequence_bias")


def check_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the token embedding of a model whose vocabulary can be trimmed.

    Raises:
        FiftyfoldError: if the model has none such.
    """
    config: Any = model.config
    name = type(model).__name__
    if structure_log(model):
        raise FiftyfoldError(f"{name} is compressed already; trim its vocabulary first, and compress it then.")
    if config.is_encoder_decoder or config.get_text_config() is not config or model.main_input_name != "input_ids":
        raise FiftyfoldError(f"the vocabulary of {name} cannot be trimmed: it is no plain encoder or decoder.")
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise FiftyfoldError(f"the vocabulary of {name} cannot be trimmed: its embedding is no nn.Embedding.")
    for option in _TOKEN_SEQUENCES:
        if getattr(getattr(model, "generation_config", None), option, None):
            raise FiftyfoldError(
                f"the generation_config of {name} has {option}, which would name other tokens; set it to None first."
            )
    return embedding


def configured_tokens(model: PreTrainedModel) -> set[int]:
    """Return the token numbers that a model's configurations name, such as that of padding."""
    return {number for _, _, value in _configured(model) for number in _as_list(value)}


class Changes:
    """Attributes that were set, and can be set back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Set everything back."""
        while self._before:
            setattr(*self._before.pop())


def keep_rows(model: PreTrainedModel, numbers: Mapping[int, int]) -> Changes:
    """Keep the rows of some tokens, in place, in the embedding and in an output layer, tied or not.

    Args:
        model: one that :func:`check_embedding` took.
        numbers: from the numbers of the kept tokens to their new ones, from 0 on in the same order.

    Raises:
        FiftyfoldError: if the padding's number decides where positions begin, and would change.
    """
    embedding = check_embedding(model)
    _check_positions(model, numbers)
    changes, rows, count = Changes(), embedding.num_embeddings, len(numbers)
    kept = torch.tensor(sorted(numbers), device=embedding.weight.device)
    head = model.get_output_embeddings()
    whole = [embedding.weight, getattr(head, "weight", None), getattr(head, "bias", None)]
    # One for each, so that what was tied stays tied.
    fewer = {
        id(part): nn.Parameter(part.detach()[kept], part.requires_grad)
        for part in whole
        if part is not None and len(part) == rows
    }
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in fewer:
                changes.set(module, name, fewer[id(parameter)])
                for size in _SIZES.intersection(vars(module)):
                    changes.set(module, size, count)
        if getattr(module, "vocab_size", None) == rows:
            changes.set(module, "vocab_size", count)
    padding = embedding.padding_idx
    changes.set(embedding, "padding_idx", None if padding is None else numbers.get(padding))
    for config, name, value in list(_configured(model)):
        changes.set(config, name, _renumbered(value, numbers))
    changes.set(model.config, "vocab_size", count)
    return changes


def _renumbered(value: int | list[int], numbers: Mapping[int, int]) -> int | list[int] | None:
    if isinstance(value, list):
        return [numbers[number] for number in value if number in numbers] or None
    return value if value < 0 else numbers.get(value)


def _check_positions(model: PreTrainedModel, numbers: Mapping[int, int]) -> None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding = module.padding_idx
            if padding is not None and numbers.get(padding) != padding:
                raise FiftyfoldError(
                    f"{name} counts from the padding's number, {padding}, which would change; keep all tokens."
                )


def _configured(model: PreTrainedModel) -> Iterator[tuple[Any, str, int | list[int]]]:
    """Yield the configurations' token numbers: where they stand, under which name, and what they are."""
    configs: list[PretrainedConfig | Any] = [model.config]
    if getattr(model, "generation_config", None) is not None:
        configs.append(model.generation_config)
    for config in configs:
        for name, value in config.to_dict().items():
            named = name.endswith(("_token_id", "_token_ids")) or name in _SUPPRESSED
            if named and _as_list(value) and hasattr(config, name):
                yield config, name, value


def _as_list(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]
