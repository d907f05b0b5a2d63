"""Making a model ready for the tensors of an exported folder, and checking that they fit before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.layers import STORED_BUFFERS, PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear
from fiftyfold.modules.packed.manifest import Kind, Manifest, PackedEntry
from fiftyfold.modules.packed.networks import packed_network
from fiftyfold.modules.packed.weights_file import TensorHeader
from fiftyfold.modules.quantization.bitsandbytes_layers import OPERATION as BITSANDBYTES
from fiftyfold.modules.quantization.bitsandbytes_layers import replay_bitsandbytes
from fiftyfold.modules.structure import STATE_KEY, loading_values
from fiftyfold.modules.surgery import leave_fused_paths, replace_module
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkConv1D,
    TensorNetworkEmbedding,
    TensorNetworkLayer,
    TensorNetworkLinear,
    install_network,
    matrix_shape,
    narrow_pivots,
)
from fiftyfold.modules.tensor_network.pivots import PIVOTS

SHARED_BUFFERS = ("weight_scale", PIVOTS)
"""Names of the buffers that go with a packed weight when layers are tied to it."""

_KINDS: dict[Kind, tuple[type[nn.Module], type[nn.Module]]] = {
    "linear": (nn.Linear, TensorNetworkLinear),
    "embedding": (nn.Embedding, TensorNetworkEmbedding),
    "conv1d": (Conv1D, TensorNetworkConv1D),
}
_FLOATS = {"F16", "BF16", "F32", "F64"}
_NAMES = {torch.int16: "I16", torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


def install_packed_layers(model: nn.Module, manifest: Manifest) -> None:
    """Put packed layers, without values, in the place of dense ones.

    Args:
        model: on any device, the meta device included; its names are those of the manifest.
        manifest: which modules, and how.

    Raises:
        FiftyfoldError: if a module is absent or is not what the manifest says.
    """
    install_bitsandbytes_layers(model, manifest)
    for name, entry in manifest.packed.items():
        dense = _find(model, name)
        _check_fit(name, dense, entry)
        if entry.settings is None:
            _store_network(dense, entry)
        else:
            replace_module(model, dense, packed_layer(name, dense, entry))
    share_tied_tensors(model, manifest)
    leave_fused_paths(model, (PackedLayer, TensorNetworkLayer))


def install_bitsandbytes_layers(model: nn.Module, manifest: Manifest) -> None:
    """Put in the layers that hold bitsandbytes' codes, which the manifest's log alone knows of."""
    names = {name for name, _ in model.named_modules()}
    with loading_values():
        for operation in manifest.structure:
            # A part of the exported model, such as its backbone, has other names; its loading then fails by the shape.
            if operation["op"] == BITSANDBYTES and names.issuperset(operation["targets"]):
                replay_bitsandbytes(model, operation)


def packed_layer(name: str, dense: nn.Module, entry: PackedEntry) -> PackedLayer:
    """Return a packed layer without values for ``dense``; its bias moves over.

    Raises:
        FiftyfoldError: if ``dense`` is not what ``entry`` says.
    """
    _check_fit(name, dense, entry)
    rows, columns = entry.shape
    layer: PackedLayer
    settings, weight = entry.settings, dense.weight
    assert settings is not None
    assert isinstance(weight, torch.Tensor)
    device = weight.device
    if entry.network is not None:
        return packed_network(dense, entry.network, settings).train(dense.training)
    if isinstance(dense, nn.Embedding):
        layer = PackedEmbedding(rows, columns, settings, device, padding_idx=dense.padding_idx, dtype=weight.dtype)
    elif isinstance(dense, Conv1D):
        layer = PackedConv1D(columns, rows, settings, dense.bias, device)
    else:
        assert isinstance(dense, nn.Linear)
        layer = PackedLinear(rows, columns, settings, dense.bias, device)
    return layer.train(dense.training)


def share_tied_tensors(model: nn.Module, manifest: Manifest) -> None:
    """Let each packed layer that owns no tensors use those of the layer that it is tied to."""
    for name, source in manifest.tied.items():
        layer, owner = model.get_submodule(name), model.get_submodule(source)
        layer.weight = owner.weight
        for buffer in SHARED_BUFFERS:
            if buffer in owner._buffers:
                layer.register_buffer(buffer, owner.get_buffer(buffer))


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
    exact = tensor.dtype == torch.uint8 or name.endswith(tuple(f".{buffer}" for buffer in (*STORED_BUFFERS, PIVOTS)))
    misfit = exact and header.dtype != _NAMES[tensor.dtype]
    if misfit or (header.dtype in _FLOATS) != tensor.is_floating_point():
        raise FiftyfoldError(f"{file} holds {name!r} as {header.dtype}, but the model wants {tensor.dtype}.")


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise _misfit(f"{name!r} is packed, but the model has no such module") from error


def _check_fit(name: str, dense: nn.Module, entry: PackedEntry) -> None:
    if not isinstance(dense, _KINDS[entry.kind]) or not isinstance(getattr(dense, "weight", None), torch.Tensor):
        raise _misfit(f"{name!r} is packed as {entry.kind}, but the model has {type(dense).__name__} there")
    rows, columns = matrix_shape(dense)
    shape = (columns, rows) if entry.kind == "conv1d" else (rows, columns)
    if shape != entry.shape:
        raise _misfit(f"{name!r} is packed with shape {entry.shape}, but the model wants {shape}")
    if entry.network is not None and entry.network.shape != (rows, columns):
        raise _misfit(f"the tensor network of {name!r} stands for a matrix {entry.network.shape}")


def _store_network(dense: nn.Module, entry: PackedEntry) -> None:
    assert entry.network is not None
    assert entry.stored_network is not None
    install_network(dense, entry.stored_network)
    assert isinstance(dense, TensorNetworkLayer)
    narrow_pivots(dense)
    dense.trained_gauge, dense.keeps_merged = entry.network.gauge, True


def _misfit(reason: str) -> FiftyfoldError:
    return FiftyfoldError(f"folder and model do not fit: {reason}.")
