"""What a model's file will take, told from its structure alone; the weights may be on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fiftyfold.kernels.packing import packed_bytes
from fiftyfold.modules.packed.skeleton import expected_tensors
from fiftyfold.modules.quantization.bitsandbytes_layers import BitsandbytesLinear
from fiftyfold.modules.quantization.layers import QuantizedLayer
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer
from fiftyfold.modules.tensor_network.pivots import PIVOTS

SCALE_BYTES = 2


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        parameters: numbers that are kept, a tied one once; of a tensor network, those of its cores.
        bytes: what the weights take in a file, without its header.
    """

    parameters: int
    bytes: float


def model_size(model: nn.Module, number_bytes: int = 2) -> Size:
    """Return the size of a model as it would be exported.

    Args:
        model: any module, on any device.
        number_bytes: bytes of a number that nothing quantizes: 2 for float16, 4 for float32.
    """
    special = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, _LAYERS)}
    networks = [layer for layer in model.modules() if isinstance(layer, TensorNetworkLayer)]
    # Counted with their forms: a file holds them in fewer bytes than training.
    pivots = {id(layer._buffers[PIVOTS]) for layer in networks if PIVOTS in layer._buffers}
    parameters, total = 0, 0.0
    for tensor in expected_tensors(model).values():
        layer = special.get(id(tensor))
        if layer is None:
            counted = isinstance(tensor, nn.Parameter)
            parameters += tensor.numel() if counted else 0
            if id(tensor) not in pivots:
                total += tensor.numel() * (number_bytes if tensor.is_floating_point() else tensor.element_size())
        elif isinstance(layer, BitsandbytesLinear):
            parameters += layer.in_features * layer.out_features
            total += tensor.nbytes
        else:
            numbers, taken = _layer_size(layer, number_bytes)
            parameters += numbers
            total += taken
    return Size(parameters, total)


def _layer_size(layer: nn.Module, number_bytes: int) -> tuple[int, float]:
    settings = layer.settings.weight if isinstance(layer, QuantizedLayer) and layer.settings is not None else None
    if isinstance(layer, TensorNetworkLayer):
        if settings is None:
            # A file keeps a network in floating point with its gauge fixed.
            form = layer.form.with_gauge("fixed")
            return form.count, form.stored_bytes(8 * number_bytes)
        shapes = [shape for shape in layer.form.matrix_shapes if shape[0]]
        places = layer.form.pivots * layer.form.pivot_bytes
        return layer.form.count, places + sum(_quantized_bytes(shape, settings) for shape in shapes)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if settings is None:
        return weight.numel(), float(weight.numel() * number_bytes)
    rows, columns = layer.canonical_weight().shape if isinstance(layer, QuantizedLayer) else weight.shape
    return weight.numel(), _quantized_bytes((rows, columns), settings)


def _quantized_bytes(shape: tuple[int, int], settings: WeightSettings) -> float:
    numbers = math.prod(shape)
    scales = {"per_tensor": 1, "per_channel": shape[0], "per_group": numbers // (settings.group_size or 1)}
    return packed_bytes(numbers, settings.bits) + scales[settings.granularity] * SCALE_BYTES


_LAYERS = (QuantizedLayer, TensorNetworkLayer, BitsandbytesLinear)
