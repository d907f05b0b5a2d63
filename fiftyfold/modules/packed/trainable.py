"""From packed layers back to layers that train."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fiftyfold.modules.packed.layers import PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear
from fiftyfold.modules.quantization.layers import RANGE_BUFFERS, activate
from fiftyfold.modules.surgery import replace_module


def make_trainable(model: nn.Module) -> None:
    """Replace packed layers by quantized ones, in place; the model computes what it computed before.

    The floating-point weights are those that the bits stand for, since the ones of the earlier training are gone:
    quantized again, they give the same bits. Where the same bits tie two layers, the new weights are tied as well. All
    parameters train.

    Args:
        model: a model with packed layers.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    weights: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, PackedLayer):
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
