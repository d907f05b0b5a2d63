"""Choosing the layers to quantize, by their place in the model or by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.layers import is_eligible
from fiftyfold.modules.surgery import plain_name
from fiftyfold.modules.tensor_network.layers import TensorNetworkEmbedding, matrix_shape

Targets = str | Sequence[str]
Choice = Callable[[dict[str, nn.Module]], set[str]]

_HEAD_NAMES = frozenset({"classifier", "score", "lm_head", "qa_outputs", "cls"})
_EXAMPLES = 5
_EMBEDDINGS = (nn.Embedding, TensorNetworkEmbedding)


def find_targets(model: nn.Module, targets: Targets = "default", exclude: Targets = ()) -> list[str]:
    """Find the layers to quantize.

    Args:
        model: any module.
        targets: ``"default"``: every Linear, Embedding and Conv1D, but for the task heads of transformers models;
            ``"xtc"``: the linear layers of the stacked layers, and the word embeddings (Wu et al., 2022). Both leave
            frozen parts out where other parts train: they are teachers. Otherwise regular expressions, one of which
            must be found in a layer's name.
        exclude: regular expressions; a layer whose name has one of them is left out.

    Returns:
        Names in the order of the model, without the parts that wrappers add. Layers that share a weight with a
        chosen one are chosen as well, so that a tied output layer reads what the embedding reads.

    Raises:
        FiftyfoldError: if nothing is found, or a pattern is wrong or finds nothing.
    """
    eligible = {name: module for name, module in named_layers(model) if is_eligible(module)}
    named: dict[str, Choice] = {"default": set, "xtc": lambda candidates: _xtc(model, candidates)}
    return choose_layers_by_name(model, eligible, targets, exclude, named, purpose="quantize")


def choose_layers_by_name(
    model: nn.Module,
    eligible: dict[str, nn.Module],
    targets: Targets,
    exclude: Targets,
    named: Mapping[str, Choice],
    *,
    purpose: str,
) -> list[str]:
    """Choose among layers by a choice that has a name, or by patterns.

    Args:
        model: that the layers belong to.
        eligible: the layers.
        targets: the name of one of the ``named`` choices, or patterns.
        exclude: patterns of names to leave out.
        named: choices by their names, among the layers that are neither frozen beside others that train nor heads.
        purpose: what is to be done with them, as a verb.

    Raises:
        FiftyfoldError: if nothing is found, or a pattern is wrong or finds nothing.
    """
    if not eligible:
        raise FiftyfoldError(f"{type(model).__name__} has no Linear, Embedding or Conv1D to {purpose}.")
    if isinstance(targets, str) and targets in named:
        left_out = frozen_parts(model) | task_heads(model)
        chosen = named[targets]({name: module for name, module in eligible.items() if name not in left_out})
    else:
        chosen = matching("targets", targets, eligible)
    chosen |= sharing_weight(chosen, eligible)
    if exclude:
        chosen -= matching("exclude", exclude, eligible)
    if not chosen:
        raise FiftyfoldError(
            f"targets {targets!r} without exclude {exclude!r} leave nothing to {purpose} in {type(model).__name__}; "
            f"its layers are {examples(eligible)}."
        )
    return [name for name in eligible if name in chosen]


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules below ``model`` by their plain names."""
    for name, module in model.named_modules():
        yield plain_name(name), module


def share_weight(layers: dict[str, nn.Module]) -> list[list[str]]:
    """Return the groups of names in ``layers`` whose layers share one weight."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def sharing_weight(chosen: set[str], eligible: dict[str, nn.Module]) -> set[str]:
    """Return the names in ``eligible`` whose layers share a weight with a chosen one and another one."""
    return {name for group in share_weight(eligible) if chosen.intersection(group) for name in group}


def matching(argument: str, patterns: Targets, eligible: dict[str, nn.Module]) -> set[str]:
    """Return the names in ``eligible`` in which one of the regular expressions is found.

    Raises:
        FiftyfoldError: if a pattern is wrong or finds nothing; ``argument`` is what the user called it.
    """
    if not isinstance(patterns, str | Iterable):
        raise FiftyfoldError(f"{argument} must be a pattern or several, not {patterns!r}.")
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            matches = {name for name in eligible if re.search(pattern, name)}
        except (re.error, TypeError) as error:
            raise FiftyfoldError(f"{argument}: {pattern!r} is not a regular expression ({error}).") from error
        if not matches:
            raise FiftyfoldError(f"{argument}: no layer's name has {pattern!r}; the names are {examples(eligible)}.")
        found |= matches
    return found


def _xtc(model: nn.Module, candidates: dict[str, nn.Module]) -> set[str]:
    linears = {name for name in in_stacks(model, candidates) if not isinstance(candidates[name], _EMBEDDINGS)}
    return linears | _word_embeddings(model, candidates)


def in_stacks(model: nn.Module, candidates: dict[str, nn.Module]) -> set[str]:
    """Return the names in ``candidates`` that stand inside a list of layers."""
    stacks = tuple(f"{name}." for name, module in named_layers(model) if isinstance(module, nn.ModuleList))
    return {name for name in candidates if name.startswith(stacks)}


def _word_embeddings(model: nn.Module, candidates: dict[str, nn.Module]) -> set[str]:
    """Find the input embeddings of transformers models; of another model, its largest embedding."""
    models = [whole for _, whole in _transformers_models(model) if _trains(whole) == _trains(model)]
    inputs = [whole.get_input_embeddings() for whole in models]
    if not models:
        embeddings = [module for module in candidates.values() if isinstance(module, _EMBEDDINGS)]
        inputs = sorted(embeddings, key=lambda embedding: -matrix_shape(embedding)[0])[:1]
    return {name for name, module in candidates.items() if any(module is embedding for embedding in inputs)}


def task_heads(model: nn.Module) -> set[str]:
    """Return the names of all modules of transformers models that do not belong to the backbone."""
    heads: set[str] = set()
    for prefix, whole in _transformers_models(model):
        backbone = whole.base_model
        inside = {id(module) for module in backbone.modules()}
        for name, module in named_layers(whole):
            outside = id(module) not in inside if backbone is not whole else name.split(".")[0] in _HEAD_NAMES
            if outside:
                heads.add(f"{prefix}.{name}".strip("."))
    return heads


def frozen_parts(model: nn.Module) -> set[str]:
    """Return the names of all modules of frozen parts beside something to train: teachers.

    A part is a transformers model at any depth, or else a direct child of ``model``. What is frozen inside a
    transformers model, such as its embeddings, belongs to a model that trains.
    """
    if not _trains(model):
        return set()
    parts: list[tuple[str, nn.Module]] = list(_transformers_models(model))
    if not isinstance(model, PreTrainedModel):
        parts += model.named_children()
    return {
        f"{prefix}.{name}".strip(".") for prefix, part in parts if not _trains(part) for name, _ in named_layers(part)
    }


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _transformers_models(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Return the transformers models inside ``model`` that stand in no other one."""
    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in named_layers(model):
        if isinstance(module, PreTrainedModel) and not any(
            outer == "" or name.startswith(f"{outer}.") for outer, _ in found
        ):
            found.append((name, module))
    return found


def examples(eligible: dict[str, nn.Module]) -> str:
    """Name some of the layers, and say how many more there are."""
    names = list(eligible)
    shown = ", ".join(names[:_EXAMPLES])
    return shown if len(names) <= _EXAMPLES else f"{shown} and {len(names) - _EXAMPLES} more"
