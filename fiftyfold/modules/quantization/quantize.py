"""The operation "quantize": which layers compute with how many bits."""

from __future__ import annotations

from typing import Any, Final, TypedDict, Unpack

from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.layers import QuantizedLayer, activate, check_settings, deactivate, install
from fiftyfold.modules.quantization.settings import (
    ActivationRange,
    ActivationSettings,
    Granularity,
    LayerSettings,
    WeightSettings,
)
from fiftyfold.modules.quantization.targets import Targets, find_targets, named_layers, share_weight
from fiftyfold.modules.structure import Operation, apply_operation, register_operation
from fiftyfold.modules.surgery import leave_fused_paths
from fiftyfold.modules.tensor_network.layers import TensorNetworkEmbedding

OPERATION: Final = "quantize"
"""Kind of a log's entry."""


class QuantizeArguments(TypedDict, total=False):
    """The arguments that say what to quantize and how; :func:`quantize` explains them."""

    weight_bits: int
    activation_bits: int | None
    granularity: Granularity
    group_size: int | None
    targets: Targets
    exclude: Targets
    symmetric: bool
    activation_range: ActivationRange
    full_range: bool
    clip: float | None


XTC_SETTINGS: Final[QuantizeArguments] = {
    "activation_bits": 8,
    "granularity": "per_tensor",
    "group_size": None,
    "targets": "xtc",
    "symmetric": True,
    "activation_range": "dynamic",
    "full_range": True,
    "clip": None,
}
"""XTC's own configuration; ``weight_bits`` is 1 or 2 (Wu et al., 2022, and the configuration files beside it)."""


def quantize(
    model: nn.Module,
    *,
    weight_bits: int = 1,
    activation_bits: int | None = 8,
    granularity: Granularity = "per_tensor",
    group_size: int | None = None,
    targets: Targets = "default",
    exclude: Targets = (),
    symmetric: bool = True,
    activation_range: ActivationRange = "dynamic",
    full_range: bool = False,
    clip: float | None = None,
    step: int = 0,
    optimizer: Optimizer | None = None,
) -> list[str]:
    """Quantize the weights and inputs of layers in place, from the next forward pass on.

    The parameters keep their full precision and go on training, with straight-through gradients. Layers that are
    quantized already get the new settings.

    Args:
        model: any module.
        weight_bits: 1 (binary), 2 (ternary), 3, 4 or 8 (uniform).
        activation_bits: 4 or 8 for the inputs of linear layers; ``None`` leaves them as they are.
        granularity: which weights share a scale: ``"per_tensor"``, ``"per_channel"`` (one scale per output), or
            ``"per_group"`` (``group_size`` neighbouring inputs of an output). Embeddings, and the output layers tied
            to them, always have one scale per row.
        group_size: entries in a group; it must divide the inputs of each chosen layer.
        targets: ``"default"``, ``"xtc"``, or patterns, as :func:`.find_targets` takes them.
        exclude: patterns of names to leave out.
        symmetric: whether inputs are quantized around zero.
        activation_range: ``"dynamic"`` measures the range of each token, ``"static"`` observes one while training.
        full_range: quantize inputs on XTC's grid, which has one more negative code.
        clip: clamp weights and inputs to ``[-clip, clip]``, without gradient outside (TernaryBERT).
        step: the optimizer step at which this happens, for the log.
        optimizer: an optimizer that holds parameters of the model; it stays as it is, because no parameter changes.

    Returns:
        The names of the quantized layers.

    Raises:
        FiftyfoldError: if an argument is impossible, or the targets match nothing or do not fit. The model is then
            unchanged.
    """
    operation = quantize_operation(
        model,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        group_size=group_size,
        targets=targets,
        exclude=exclude,
        symmetric=symmetric,
        activation_range=activation_range,
        full_range=full_range,
        clip=clip,
        step=step,
    )
    apply_operation(model, operation, [] if optimizer is None else [optimizer])
    return list(operation["targets"])


def quantize_operation(
    model: nn.Module,
    *,
    weight_bits: int = 1,
    activation_bits: int | None = 8,
    granularity: Granularity = "per_tensor",
    group_size: int | None = None,
    targets: Targets = "default",
    exclude: Targets = (),
    symmetric: bool = True,
    activation_range: ActivationRange = "dynamic",
    full_range: bool = False,
    clip: float | None = None,
    step: int = 0,
) -> Operation:
    """Return the log entry that :func:`quantize` would carry out, and change nothing.

    Raises:
        FiftyfoldError: as :func:`quantize` does.
    """
    activation = None
    if activation_bits is not None:
        activation = ActivationSettings(activation_bits, symmetric, activation_range, full_range, clip)
    linear = LayerSettings(WeightSettings(weight_bits, granularity, group_size, clip), activation)
    by_row = LayerSettings(WeightSettings(weight_bits, "per_channel", None, clip))
    layers = dict(named_layers(model))
    names = find_targets(model, targets, exclude)
    rows = _quantized_by_row({name: layers[name] for name in names})
    chosen = {name: by_row if name in rows else linear for name in names}
    for name, settings in chosen.items():
        _check_layer(name, layers[name], settings)
    used = [settings for settings in (linear, by_row) if settings in chosen.values()]
    return {
        "op": OPERATION,
        "targets": {name: used.index(settings) for name, settings in chosen.items()},
        "settings": [settings.to_json() for settings in used],
        "step": step,
    }


def install_quantizers(model: nn.Module, **arguments: Unpack[QuantizeArguments]) -> list[str]:
    """Make the layers that :func:`quantize` would choose ready for it, and leave what they compute as it is.

    Args:
        model: any module.
        **arguments: those of :func:`quantize`, but for ``step`` and ``optimizer``.

    Returns:
        The names of the layers.

    Raises:
        FiftyfoldError: as :func:`quantize` does.
    """
    operation = quantize_operation(model, **arguments)
    settings = [LayerSettings.from_json(values) for values in operation["settings"]]
    layers = dict(named_layers(model))
    for name, index in operation["targets"].items():
        install(layers[name], settings[index].activation)
    return list(operation["targets"])


def _quantized_by_row(layers: dict[str, nn.Module]) -> set[str]:
    embeddings = {name for name, layer in layers.items() if isinstance(layer, nn.Embedding | TensorNetworkEmbedding)}
    tied = {name for group in share_weight(layers) if embeddings.intersection(group) for name in group}
    return embeddings | tied


def _check_layer(name: str, layer: nn.Module, settings: LayerSettings) -> None:
    try:
        check_settings(layer, settings)
    except FiftyfoldError as error:
        raise FiftyfoldError(f"{name}: {error}") from error


def _replay(model: nn.Module, operation: Operation) -> None:
    layers = dict(named_layers(model))
    for name, settings in _read(operation).items():
        if name not in layers:
            raise FiftyfoldError(f"the log quantizes {name!r}, which {type(model).__name__} does not have.")
        activate(layers[name], settings)
    leave_fused_paths(model, QuantizedLayer)


def _undo(model: nn.Module, operation: Operation) -> None:
    layers = dict(named_layers(model))
    for name in operation["targets"]:
        deactivate(layers[name])


def _read(operation: Operation) -> dict[str, LayerSettings]:
    try:
        values: list[Any] = operation["settings"]
        settings = [LayerSettings.from_json(entry) for entry in values]
        return {name: settings[index] for name, index in operation["targets"].items()}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FiftyfoldError("the log's entry 'quantize' cannot be read; the file is corrupt.") from error


register_operation(OPERATION, _replay, undo=_undo)
