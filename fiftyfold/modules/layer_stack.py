"""Finding a transformer's stack of layers, and keeping some of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.surgery import plain_name

_COUNT = "num_hidden_layers"


def find_layer_stack(model: nn.Module) -> str:
    """Find the list of transformer layers by its form.

    It is the ``nn.ModuleList`` with the most parameters whose children are all of one class. Lists with something to
    train go before frozen ones, so that a frozen teacher inside the same module is not taken for the student.

    Returns:
        The list's name below ``model``, e.g. ``"bert.encoder.layer"``, without the parts that wrappers add; ``""`` if
        ``model`` itself is the list.

    Raises:
        FiftyfoldError: if there is none, or if the model has an encoder and a decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise FiftyfoldError(
            f"{type(model).__name__} has two stacks of layers, an encoder's and a decoder's; "
            "reduce each by itself, e.g. reduce_layers(model.get_encoder(), ...)."
        )
    stacks: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if _is_stack(module)}
    if not stacks:
        raise FiftyfoldError(
            f"{type(model).__name__} has no list of layers: no nn.ModuleList in it holds layers of one class."
        )
    found = max(stacks, key=lambda name: _weight(stacks[name]))
    return plain_name(found)


def layer_stack(model: nn.Module, name: str) -> nn.ModuleList:
    """Return the stack called ``name``.

    Raises:
        FiftyfoldError: if ``model`` has no such ``nn.ModuleList``.
    """
    try:
        stack = model.get_submodule(name)
    except AttributeError as error:
        raise FiftyfoldError(f"{type(model).__name__} has no module {name!r}.") from error
    if not isinstance(stack, nn.ModuleList):
        raise FiftyfoldError(f"{name!r} is a {type(stack).__name__}; a stack of layers is an nn.ModuleList.")
    return stack


def keep_layers(model: nn.Module, name: str, layers: Sequence[int]) -> None:
    """Drop all layers of a stack but ``layers``, in place, and mend indices and configuration.

    Args:
        model: contains the stack; works on the meta device too.
        name: the stack's name below ``model``.
        layers: rising indices of the layers that stay, counted from 0.

    Raises:
        FiftyfoldError: if an index does not fit, or if the parameters are sharded.
    """
    stack = layer_stack(model, name)
    check_layers(layers, len(stack))
    if any(isinstance(parameter, DTensor) for parameter in stack.parameters()):
        raise FiftyfoldError("layers cannot be dropped from a sharded model; reduce it before it is sharded.")
    total, kept = len(stack), [stack[index] for index in layers]
    _refuse_scaling_by_number(kept, layers)
    # The list object stays: other attributes may refer to it.
    del stack[:]
    stack.extend(kept)
    _renumber(stack)
    for holder in _path(model, name):
        config = getattr(holder, "config", None)
        if isinstance(config, PretrainedConfig) and getattr(config, _COUNT, None) == total:
            _replace_config(model, config, _reduced_config(config, layers))


def check_layers(layers: Sequence[int], total: int) -> None:
    """Refuse a list of layers that a stack of ``total`` layers cannot keep.

    Raises:
        FiftyfoldError: naming what is wrong with the list.
    """
    if not layers:
        raise FiftyfoldError("the list of layers to keep is empty; keep at least one.")
    if not all(type(index) is int for index in layers):
        raise FiftyfoldError(f"the layers to keep must be whole numbers, not {list(layers)}.")
    outside = [index for index in layers if not 0 <= index < total]
    if outside:
        raise FiftyfoldError(f"there is no layer {outside[0]}; the model has {total}, numbered 0 to {total - 1}.")
    if any(first >= second for first, second in itertools.pairwise(layers)):
        raise FiftyfoldError(f"the layers to keep must rise without repetition, not {list(layers)}.")


def _is_stack(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(True for _ in module.parameters())
    )


def _weight(stack: nn.Module) -> tuple[int, int]:
    parameters = list(stack.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters)


def _refuse_scaling_by_number(kept: Sequence[nn.Module], layers: Sequence[int]) -> None:
    """GPT-2 can divide the attention scores of layer i by i + 1, which another number would change."""
    for number, (layer, index) in enumerate(zip(kept, layers, strict=True)):
        scaled = any(getattr(module, "scale_attn_by_inverse_layer_idx", False) for module in layer.modules())
        if scaled and number != index:
            raise FiftyfoldError(
                f"layer {index} divides its attention scores by {index + 1} (scale_attn_by_inverse_layer_idx), and as "
                f"layer {number} it would divide by {number + 1}; divide its query weights and biases by {index + 1} "
                "instead, turn the option off in the configuration, and drop layers then."
            )


def _renumber(stack: nn.ModuleList) -> None:
    """Close the gaps: a decoder's layers find their cache by ``layer_idx``."""
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def _path(model: nn.Module, name: str) -> Iterator[nn.Module]:
    yield model
    for position, letter in enumerate(name):
        if letter == ".":
            yield model.get_submodule(name[:position])


def _reduced_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    reduced = copy.deepcopy(config)
    total = getattr(config, _COUNT)
    for key, value in vars(config).items():
        # layer_types, mlp_layer_types, no_rope_layers, ...: one entry per layer.
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(reduced, key, [value[index] for index in layers])
    setattr(reduced, _COUNT, len(layers))
    return reduced


def _replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Give every module of ``model`` the new object; other models built from the old one keep it as it is."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
