"""From packed layers back to layers that train."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fiftyfold.modules.packed.layers import PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear
from fiftyfold.modules.packed.networks import (
    PackedNetworkConv1D,
    PackedNetworkEmbedding,
    PackedNetworkLayer,
    PackedNetworkLinear,
)
from fiftyfold.modules.quantization.layers import RANGE_BUFFERS, activate
from fiftyfold.modules.surgery import replace_module
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkLayer,
    change_gauge,
    install_network,
    widen_pivots,
)
from fiftyfold.modules.tensor_network.pivots import PIVOTS


def make_trainable(model: nn.Module) -> None:
    """Replace packed layers by quantized ones, and free the gauge of networks, in place; the outputs stay.

    The floating-point weights are those that the bits stand for, since the ones of the earlier training are gone:
    quantized again, they give the same bits. Where the same bits tie two layers, the new weights are tied as well. All
    parameters train.

    Args:
        model: a model with packed layers.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    weights: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, PackedNetworkLayer):
            replace_module(model, module, _trainable_network(module, weights))
        elif isinstance(module, TensorNetworkLayer):
            _free(module, weights)
        elif isinstance(module, PackedLayer):
            weight = weights.setdefault(id(module.weight), nn.Parameter(_latent_weight(module, dtype)))
            dense = _dense_layer(module)
            dense.register_parameter("weight", weight)
            activate(dense, module.settings)
            for name in RANGE_BUFFERS:
                if name in dense._buffers:
                    dense._buffers[name] = module.get_buffer(name)
            replace_module(model, module, dense.train(module.training))
    model.requires_grad_(True)
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False
        model.__dict__.pop("_adjust_bias", None)


def _trainable_network(packed: PackedNetworkLayer, weights: dict[int, nn.Parameter]) -> nn.Module:
    """Return a network with latent cores that quantize to those of the packed one."""
    numbers = torch.cat([matrix.reshape(-1) for matrix in packed.matrices()])
    weight = weights.setdefault(id(packed.weight), nn.Parameter(numbers))
    with torch.device("meta"):
        layer: nn.Module
        if isinstance(packed, PackedNetworkEmbedding):
            layer = nn.Embedding(packed.rows, packed.columns, padding_idx=packed.padding_idx)
        elif isinstance(packed, PackedNetworkConv1D):
            layer = Conv1D(packed.rows, packed.columns)
        else:
            layer = nn.Linear(packed.columns, packed.rows, bias=False)
    if isinstance(packed, PackedNetworkLinear):
        layer.register_parameter("bias", packed.bias)
    install_network(layer, packed.form, weight, packed._buffers.get(PIVOTS))
    activate(layer, packed.settings)
    for name in RANGE_BUFFERS:
        if name in layer._buffers:
            layer._buffers[name] = packed.get_buffer(name)
    return layer.train(packed.training)


def _free(module: TensorNetworkLayer, weights: dict[int, nn.Parameter]) -> None:
    """Give a network in floating point the gauge in which it trained, and tie again what was tied."""
    stored = module.weight
    if module.trained_gauge is not None:
        change_gauge(module, module.trained_gauge)
    widen_pivots(module)
    freed = module.weight
    assert isinstance(freed, nn.Parameter)
    module.register_parameter("weight", weights.setdefault(id(stored), freed))
    module.trained_gauge, module.keeps_merged = None, False
    module.forget_merged()


def _latent_weight(packed: PackedLayer, dtype: torch.dtype) -> torch.Tensor:
    weight = packed.dense_weight(dtype)
    return weight.t().contiguous() if isinstance(packed, PackedConv1D) else weight


def _dense_layer(packed: PackedLayer) -> nn.Module:
    """Return a dense layer that has its bias already, and its weight not yet."""
    layer: nn.Module
    with torch.device("meta"):  # no random numbers for weights that are replaced at once
        if isinstance(packed, PackedEmbedding):
            layer = nn.Embedding(packed.rows, packed.columns, padding_idx=packed.padding_idx)
        elif isinstance(packed, PackedConv1D):
            layer = Conv1D(packed.rows, packed.columns)
        else:
            layer = nn.Linear(packed.columns, packed.rows, bias=False)
    if isinstance(packed, PackedLinear):
        layer.register_parameter("bias", packed.bias)
    return layer
