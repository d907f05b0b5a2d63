"""Tensor networks whose cores are packed into bits, as they are deployed.

Cores in floating point need no class of their own: they are the trained layers with the gauge fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.kernels.packing import packed_bytes, unpack_codes
from fiftyfold.modules.packed.layers import PackedLayer
from fiftyfold.modules.quantization.quantizers import check_shape, dequantize_weight, scale_shape
from fiftyfold.modules.quantization.settings import LayerSettings
from fiftyfold.modules.tensor_network.contraction import break_even
from fiftyfold.modules.tensor_network.form import NetworkForm
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkConv1D,
    TensorNetworkEmbedding,
    TensorNetworkLayer,
    TensorNetworkLinear,
)
from fiftyfold.modules.tensor_network.pivots import PIVOTS, stored_type


class PackedNetworkLayer(PackedLayer, TensorNetworkLayer):
    """What packed tensor networks have in common: bits and scales of all matrices of numbers, one after another.

    Args:
        form: which matrices.
        settings: how they are quantized.
        device: where the tensors are created, without values.
        dtype: type that the cores are unpacked to; follows the model when that is cast.
    """

    weight: nn.Parameter
    output_type: torch.Tensor

    def __init__(
        self, form: NetworkForm, settings: LayerSettings, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.rows, self.columns = form.shape
        self.form, self.settings = form, settings
        self._break_even = break_even(form)
        self._codes = self._arranged = self._tabled = None
        self.keeps_merged = True
        content = torch.empty(sum(self._byte_counts()), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(content, requires_grad=False)
        scales = torch.empty(sum(map(math.prod, self._scale_shapes())), dtype=torch.float16, device=device)
        self.register_buffer("weight_scale", scales)
        self.register_ranges(device)
        self.register_buffer("output_type", torch.empty(0, dtype=dtype, device=device), persistent=False)
        if form.gauge == "fixed":
            self.register_buffer(PIVOTS, torch.zeros(form.pivots, dtype=stored_type(form), device=device))

    def matrices(self) -> list[torch.Tensor]:
        """Return the matrices of numbers that the bits stand for."""
        bits, dtype = self.settings.weight.bits, self.output_type.dtype
        contents = self.weight.split(self._byte_counts())
        scales = self.weight_scale.split([math.prod(shape) for shape in self._scale_shapes()])
        return [
            dequantize_weight(unpack_codes(content, bits, math.prod(shape)).view(shape), scale.view(scaled), dtype)
            if shape[0]
            else torch.empty(shape, dtype=dtype, device=content.device)
            for content, scale, shape, scaled in zip(
                contents, scales, self.form.matrix_shapes, self._scale_shapes(), strict=True
            )
        ]

    def dense_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the matrix that the cores stand for, (rows, columns)."""
        matrix = TensorNetworkLayer.dense_weight(self)
        return matrix if dtype is None else matrix.to(dtype)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"{TensorNetworkLayer.extra_repr(self)}, settings={self.settings}"

    def forget_codes(self) -> None:
        """Drop what was kept of the matrix."""
        self._forget()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedNetworkLayer:
        self._forget()
        PackedLayer._apply(self, fn, recurse)
        return self

    def _byte_counts(self) -> list[int]:
        bits = self.settings.weight.bits
        return [packed_bytes(math.prod(shape), bits) if shape[0] else 0 for shape in self.form.matrix_shapes]

    def _scale_shapes(self) -> list[tuple[int, int]]:
        shapes = []
        for shape in self.form.matrix_shapes:
            if shape[0]:
                check_shape(shape, self.settings.weight)
            shapes.append(scale_shape(shape, self.settings.weight) if shape[0] else (0, 1))
        return shapes


class PackedNetworkLinear(PackedNetworkLayer, TensorNetworkLinear):
    """A linear layer as a tensor network with packed cores."""

    weight: nn.Parameter

    def __init__(
        self,
        form: NetworkForm,
        settings: LayerSettings,
        bias: nn.Parameter | None,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(form, settings, device, dtype)
        self.out_features, self.in_features = form.shape
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output: (…, inputs) → (…, outputs)."""
        return TensorNetworkLinear.forward(self, self.quantize_input(x))


class PackedNetworkConv1D(PackedNetworkLinear, TensorNetworkConv1D):
    """GPT-2's ``Conv1D`` as a tensor network with packed cores."""

    weight: nn.Parameter


class PackedNetworkEmbedding(PackedNetworkLayer, TensorNetworkEmbedding):
    """An embedding as a tensor network with packed cores."""

    weight: nn.Parameter

    def __init__(
        self,
        form: NetworkForm,
        settings: LayerSettings,
        device: torch.device | None,
        dtype: torch.dtype,
        padding_idx: int | None,
    ) -> None:
        super().__init__(form, settings, device, dtype)
        self.num_embeddings, self.embedding_dim = form.shape
        self.padding_idx = padding_idx

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows: (…) integers → (…, features)."""
        return TensorNetworkEmbedding.forward(self, tokens)


def packed_network(dense: nn.Module, form: NetworkForm, settings: LayerSettings) -> PackedNetworkLayer:
    """Return a packed network without values for a layer; its bias moves over.

    Args:
        dense: the layer that it takes the place of, dense or a network.
        form: of the network.
        settings: how its cores and its input are quantized.
    """
    weight = dense.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(dense, nn.Embedding | TensorNetworkEmbedding):
        return PackedNetworkEmbedding(form, settings, weight.device, weight.dtype, dense.padding_idx)
    conv = isinstance(dense, Conv1D | TensorNetworkConv1D)
    kind = PackedNetworkConv1D if conv else PackedNetworkLinear
    bias = dense.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return kind(form, settings, bias, weight.device, weight.dtype)
