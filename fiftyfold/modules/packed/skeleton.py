"""Making a model ready for the tensors of an exported folder, and checking that they fit before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.layers import STORED_BUFFERS, PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear
from fiftyfold.modules.packed.manifest import Manifest, PackedEntry
from fiftyfold.modules.packed.weights_file import TensorHeader
from fiftyfold.modules.structure import STATE_KEY
from fiftyfold.modules.surgery import replace_module

_FLOATS = {"F16", "BF16", "F32", "F64"}
_NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


def install_packed_layers(model: nn.Module, manifest: Manifest) -> None:
    """Put packed layers, without values, in the place of dense ones.

    Args:
        model: on any device, the meta device included; its names are those of the manifest.
        manifest: which modules, and how.

    Raises:
        FiftyfoldError: if a module is absent or is not what the manifest says.
    """
    for name, entry in manifest.packed.items():
        replace_module(model, _find(model, name), packed_layer(name, _find(model, name), entry))
    share_tied_tensors(model, manifest)
    leave_fused_paths(model)


def leave_fused_paths(model: nn.Module) -> None:
    """Keep torch's encoder layers from computing with the packed bytes as if they were a dense weight."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(m, PackedLayer) for m in layer.modules()):
            layer.activation_relu_or_gelu = 0


def packed_layer(name: str, dense: nn.Module, entry: PackedEntry) -> PackedLayer:
    """Return a packed layer without values for ``dense``; its bias moves over.

    Raises:
        FiftyfoldError: if ``dense`` is not what ``entry`` says.
    """
    types = {"linear": nn.Linear, "embedding": nn.Embedding, "conv1d": Conv1D}
    weight = getattr(dense, "weight", None)
    if not isinstance(dense, types[entry.kind]) or not isinstance(weight, torch.Tensor):
        raise _misfit(f"{name!r} is packed as {entry.kind}, but the model has {type(dense).__name__} there")
    if tuple(weight.shape) != entry.shape:
        raise _misfit(f"{name!r} is packed with shape {entry.shape}, but the model wants {tuple(weight.shape)}")
    rows, columns = entry.shape
    layer: PackedLayer
    settings, device = entry.settings, weight.device
    if isinstance(dense, nn.Embedding):
        layer = PackedEmbedding(rows, columns, settings, device, padding_idx=dense.padding_idx, dtype=weight.dtype)
    elif isinstance(dense, Conv1D):
        layer = PackedConv1D(columns, rows, settings, dense.bias, device)
    else:
        layer = PackedLinear(rows, columns, settings, dense.bias, device)
    return layer.train(dense.training)


def share_tied_tensors(model: nn.Module, manifest: Manifest) -> None:
    """Let each packed layer that owns no tensors use those of the layer that it is tied to."""
    for name, source in manifest.tied.items():
        layer, owner = model.get_submodule(name), model.get_submodule(source)
        layer.weight = owner.weight
        layer.weight_scale = owner.weight_scale


def expected_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a file for ``model`` must hold: tensors by name, one that several names share under its first."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == STATE_KEY:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise FiftyfoldError(f"{name!r} is no tensor but {type(tensor).__name__}, which a folder cannot hold.")
        if first.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    return tensors


def check_headers(expected: Mapping[str, torch.Tensor], headers: Mapping[str, TensorHeader], file: Path) -> None:
    """Compare what a model needs with what its file says it holds.

    Args:
        expected: from :func:`expected_tensors`, perhaps on the meta device.
        headers: from :func:`fiftyfold.modules.packed.weights_file.read_headers`.
        file: for the message.

    Raises:
        FiftyfoldError: on the first tensor that is missing, or of another shape or type, or that nobody asked for.
    """
    for name, tensor in expected.items():
        check_header(name, tensor, headers.get(name), file)
    if extra := sorted(set(headers) - set(expected)):
        raise FiftyfoldError(f"{file} holds {extra[0]!r}, which the model does not have; export the folder again.")


def check_header(name: str, tensor: torch.Tensor, header: TensorHeader | None, file: Path) -> None:
    """Compare one tensor of a model with one in a file.

    Raises:
        FiftyfoldError: if it is missing, or shape or type differ; outside packed layers, one floating-point type is as
            good as another.
    """
    if header is None:
        raise FiftyfoldError(f"{file} lacks the tensor {name!r}; copy or export the folder again.")
    if header.shape != tuple(tensor.shape):
        raise FiftyfoldError(
            f"{file} holds {name!r} with shape {header.shape}, but the model wants {tuple(tensor.shape)}; "
            "weights and configuration do not belong together."
        )
    exact = tensor.dtype == torch.uint8 or name.endswith(tuple(f".{buffer}" for buffer in STORED_BUFFERS))
    misfit = exact and header.dtype != _NAMES[tensor.dtype]
    if misfit or (header.dtype in _FLOATS) != tensor.is_floating_point():
        raise FiftyfoldError(f"{file} holds {name!r} as {header.dtype}, but the model wants {tensor.dtype}.")


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _misfit(f"{name!r} is packed, but the model has no such module") from error


def _misfit(reason: str) -> FiftyfoldError:
    return FiftyfoldError(f"folder and model do not fit: {reason}.")
