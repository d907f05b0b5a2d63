"""From a trained model to what a file holds: packed codes, scales, and the rest in a narrower type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import pack_codes
from fiftyfold.modules.packed.layers import STORED_BUFFERS, PackedConv1D, PackedEmbedding, PackedLayer
from fiftyfold.modules.packed.manifest import Kind, Manifest, PackedEntry, RestDtype
from fiftyfold.modules.packed.networks import packed_network
from fiftyfold.modules.packed.skeleton import SHARED_BUFFERS, expected_tensors, packed_layer
from fiftyfold.modules.quantization.layers import (
    RANGE_BUFFERS,
    QuantizedLayer,
    QuantizedNetworkLayer,
    codes_and_scale,
    effective_weight,
    quantized_layers,
)
from fiftyfold.modules.quantization.quantizers import quantize_weight
from fiftyfold.modules.quantization.settings import LayerSettings
from fiftyfold.modules.structure import structure_log
from fiftyfold.modules.surgery import replace_module
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkConv1D,
    TensorNetworkEmbedding,
    TensorNetworkLayer,
    change_gauge,
    narrow_pivots,
    normalize_gauge,
)
from fiftyfold.modules.tensor_network.pivots import PIVOTS, stored_rows

LayerToPack = QuantizedLayer | PackedLayer | TensorNetworkLayer


@dataclass(frozen=True)
class Contents:
    """What an exported folder holds of a model.

    Attributes:
        manifest: how to read the tensors.
        tensors: all of them, by name, on the CPU.
    """

    manifest: Manifest
    tensors: dict[str, torch.Tensor]


def pack_model(model: nn.Module, rest_dtype: RestDtype = "float16") -> Contents:
    """Replace the quantized layers of ``model`` by packed ones, in place, and collect what a file holds.

    Layers that are packed already stay as they are.

    Args:
        model: a model of its own, because it is changed; its structure log goes into the manifest.
        rest_dtype: type of the floating-point tensors outside packed layers.

    Raises:
        FiftyfoldError: if a layer or a tensor cannot be written.
    """
    manifest = describe(model, rest_dtype)
    for name, module in _layers_to_pack(model):
        entry = manifest.packed[name]
        if entry.settings is None:
            assert isinstance(module, TensorNetworkLayer)
            store_network(module)
        elif isinstance(module, QuantizedLayer):
            replace_module(model, module, pack_layer(name, module, entry))
    return Contents(manifest, collect_tensors(model, manifest))


def describe(model: nn.Module, rest_dtype: RestDtype) -> Manifest:
    """Return the manifest of a model as it is now, its quantized layers counted as packed ones.

    Raises:
        FiftyfoldError: if the model is nothing but a layer.
    """
    packed: dict[str, PackedEntry] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in _layers_to_pack(model):
        if not name:
            raise FiftyfoldError("a layer alone cannot be exported; put it into a module, such as nn.Sequential.")
        packed[name] = packed_entry(module)
        owner = owners.setdefault(id(module.weight), name)
        if owner != name and packed[name].can_share(packed[owner]):
            tied[name] = owner
    return Manifest(structure_log(model), packed, tied, rest_dtype)


def collect_tensors(model: nn.Module, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the tensors of a packed model as its file holds them, on the CPU.

    What is not packed is narrowed to the manifest's type where that loses nothing, as after :func:`round_rest`.

    Raises:
        FiftyfoldError: if there is state that is no tensor.
    """
    narrow = getattr(torch, manifest.rest_dtype)
    stored = {f"{name}.{buffer}" for name in manifest.packed for buffer in STORED_BUFFERS}
    tied = {f"{name}.{tensor}" for name in manifest.tied for tensor in ("weight", *SHARED_BUFFERS)}
    return {
        name: (tensor.detach() if name in stored else _narrowed(tensor.detach(), narrow)).cpu()
        for name, tensor in expected_tensors(model).items()
        if name not in tied
    }


@torch.no_grad()
def round_rest(model: nn.Module, dtype: RestDtype = "float16") -> None:
    """Round, in place, everything outside quantized layers' weights to the type in which a file holds it.

    The tensors keep their type; only their values change. Tensor networks first get the identity blocks that a file
    leaves out, which changes what they compute by no more than rounding. What :func:`.export` writes of a model so
    rounded loads back bit for bit. A tensor with values beyond the range of ``dtype``, or already as narrow, stays as
    it is.

    Args:
        model: any model.
        dtype: ``"float16"`` or ``"float32"``.
    """
    narrow = getattr(torch, dtype)
    for _, layer in _layers_to_pack(model):
        if isinstance(layer, TensorNetworkLayer) and layer.settings is None:
            normalize_gauge(layer)
    exempt = {id(tensor) for _, layer in _layers_to_pack(model) for tensor in _own_tensors(layer)}
    for tensor in expected_tensors(model).values():
        if id(tensor) not in exempt and _is_wider(tensor, narrow):
            rounded = tensor.to(narrow)
            if torch.equal(rounded.isinf(), tensor.isinf()):
                tensor.copy_(rounded)


@torch.no_grad()
def separate_dense_weights(model: nn.Module) -> None:
    """Give a dense layer that shares the weight of a quantized one a copy of its own, in place.

    A file holds the one packed and the other not, so they cannot stay tied.
    """
    latent = {id(layer.weight) for _, layer in quantized_layers(model)}
    for module in model.modules():
        if not isinstance(module, QuantizedLayer) or module.settings is None:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in latent:
                    setattr(module, name, nn.Parameter(parameter.clone(), parameter.requires_grad))


def pack_layer(name: str, layer: QuantizedLayer, entry: PackedEntry) -> PackedLayer:
    """Return the packed form of a quantized layer; its bias moves over.

    Raises:
        FiftyfoldError: if the layer has no packed form, or its weight is not finite.
    """
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise FiftyfoldError(f"{name!r} renormalizes its rows (max_norm) and cannot be packed; exclude it.")
    if isinstance(layer, QuantizedNetworkLayer):
        return _pack_network(name, layer, entry)
    try:
        codes, scale = codes_and_scale(layer)
    except FiftyfoldError as error:
        raise FiftyfoldError(f"{name}: {error}") from error
    packed = packed_layer(name, layer, entry)
    packed.weight.data = pack_codes(codes, packed.settings.weight.bits)
    packed.weight_scale = scale.clone()
    _copy_ranges(layer, packed)
    if not torch.equal(packed.dense_weight(layer.weight.dtype), effective_weight(layer)):
        raise FiftyfoldError(f"{name!r} does not unpack to the weight that was trained; please report this as a bug.")
    return packed


def packed_entry(layer: LayerToPack) -> PackedEntry:
    """Describe a quantized or packed layer, or a tensor network, for the manifest."""
    settings = layer.settings
    if isinstance(layer, TensorNetworkLayer):
        return _network_entry(layer, settings)
    assert settings is not None
    if isinstance(layer, PackedLayer):
        shape = (layer.rows, layer.columns)
        kind: Kind = "linear"
        if isinstance(layer, PackedConv1D):
            kind, shape = "conv1d", shape[::-1]
        elif isinstance(layer, PackedEmbedding):
            kind = "embedding"
        return PackedEntry(kind, shape, settings)
    rows, columns = layer.weight.shape
    kind = "embedding" if isinstance(layer, nn.Embedding) else "conv1d" if isinstance(layer, Conv1D) else "linear"
    return PackedEntry(kind, (rows, columns), settings)


def store_network(layer: TensorNetworkLayer) -> None:
    """Give a network in floating point the form in which a file keeps it, in place."""
    layer.trained_gauge = layer.trained_gauge or layer.form.gauge
    change_gauge(layer, "fixed")
    narrow_pivots(layer)
    layer.keeps_merged = True


def _pack_network(name: str, layer: QuantizedNetworkLayer, entry: PackedEntry) -> PackedLayer:
    assert entry.settings is not None
    packed = packed_network(layer, layer.form, entry.settings).train(layer.training)
    codes, scales = [], []
    for matrix in layer.latent_matrices():
        if matrix.numel():
            try:
                code, scale = quantize_weight(matrix, entry.settings.weight)
            except FiftyfoldError as error:
                raise FiftyfoldError(f"{name}: {error}") from error
            codes.append(pack_codes(code, entry.settings.weight.bits))
            scales.append(scale.flatten())
    packed.weight.data, packed.weight_scale = torch.cat(codes), torch.cat(scales)
    _copy_ranges(layer, packed)
    if PIVOTS in layer._buffers:
        packed._buffers[PIVOTS] = stored_rows(layer.get_buffer(PIVOTS), layer.form)
    if not torch.equal(packed.dense_weight(layer.weight.dtype), layer.dense_weight()):
        raise FiftyfoldError(f"{name!r} does not unpack to the weight that was trained; please report this as a bug.")
    return packed


def _copy_ranges(layer: QuantizedLayer, packed: PackedLayer) -> None:
    for buffer in RANGE_BUFFERS:
        if buffer in layer._buffers:
            packed._buffers[buffer] = layer.get_buffer(buffer).to(torch.float32)


def _network_entry(layer: TensorNetworkLayer, settings: LayerSettings | None) -> PackedEntry:
    rows, columns = layer.form.shape
    form = layer.form if layer.trained_gauge is None else layer.form.with_gauge(layer.trained_gauge)
    if isinstance(layer, TensorNetworkConv1D):
        return PackedEntry("conv1d", (columns, rows), settings, form)
    kind: Kind = "embedding" if isinstance(layer, TensorNetworkEmbedding) else "linear"
    return PackedEntry(kind, (rows, columns), settings, form)


def _layers_to_pack(model: nn.Module) -> Iterator[tuple[str, LayerToPack]]:
    for name, module in list(model.named_modules()):
        quantized = isinstance(module, QuantizedLayer | PackedLayer) and module.settings is not None
        if quantized or isinstance(module, TensorNetworkLayer):
            yield name, module


def _own_tensors(layer: LayerToPack) -> list[torch.Tensor]:
    if layer.settings is None:
        return []
    return [layer.weight, *(buffer for buffer in layer._buffers.values() if buffer is not None)]


def _is_wider(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > dtype.itemsize


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not _is_wider(tensor, dtype):
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
