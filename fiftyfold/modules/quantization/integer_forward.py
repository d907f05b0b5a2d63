"""The linear layer in training with an integer forward product.

Under quantizers the forward product is one of integers, with scales; computed as such it is exact, and quicker than in
float32. The backward products are those of the fake-quantized layer: of float32 weights and inputs that stand for the
codes, made when they are needed. Nothing is kept from the forward pass but the input, which is there anyway, and codes.
The product that takes the gradient to the input needs no more than the codes either, see
:mod:`fiftyfold.kernels.table_product`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from fiftyfold.kernels import table_product, training
from fiftyfold.kernels.backends import PACKED_BITS, backend_for
from fiftyfold.kernels.linear import largest_inputs
from fiftyfold.kernels.operators import arrange_weight
from fiftyfold.kernels.path import current_path
from fiftyfold.modules.quantization.integer_product import multiply_integers
from fiftyfold.modules.quantization.quantizers import fake_quantize_activation, fused_weight_arguments
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings


@dataclass(frozen=True)
class ArrangedWeight:
    """A quantized weight as the forward product reads it, and as the backward product does.

    Attributes:
        settings: how it was quantized.
        checksum: of the weight that was.
        stored: its codes and scales.
        arranged: the codes as :func:`fiftyfold.kernels.operators.packed_linear` reads them.
        scale: the scales as it reads them.
    """

    settings: WeightSettings
    checksum: int
    stored: training.WeightCodes
    arranged: torch.Tensor
    scale: torch.Tensor

    def multiply_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows`` (tokens, outputs) times the weight: (tokens, inputs), in the type of ``rows``."""
        if rows.dtype != torch.float32 or self.stored.scale.shape[1] > 1 or not len(rows):
            return rows @ training.dequantize_weight(self.stored).to(rows.dtype)
        inputs = self.stored.codes.shape[1]
        return table_product.multiply_rows(rows, self._entries, self.stored.scale, self.settings.bits, inputs)

    @functools.cached_property
    def _entries(self) -> torch.Tensor:
        return table_product.find_entries(self.stored.codes, self.settings.bits)


SMALLEST_WEIGHT = 2**19
"""Entries of a weight from which on integers pay in training whatever it is multiplied with: they save passes over it.

See benchmarks/training_layer.py for both sizes."""

SMALLEST_PRODUCT = 2**23
"""Multiplications from which on integers pay in training, however small the weight."""

# By weight, so that a weight's successor, copy or owner in another process finds nothing.
_kept = WeakTensorKeyDictionary()


def takes_integers(x: torch.Tensor, weight: torch.Tensor, settings: LayerSettings) -> bool:
    """Tell whether a layer's forward product is to be one of integers: where that is exact, and pays.

    Without gradients it always is, so that a trained model gives the exported one's bits.
    """
    activation = settings.activation
    return (
        current_path() == "integer"
        and activation is not None
        and activation.symmetric
        and settings.weight.bits in PACKED_BITS
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.is_floating_point()
        and x.dtype != torch.float64
        and weight.shape[1] <= largest_inputs(activation.bits)
        and training.is_native(weight)
        and backend_for("cpu") is not None
        and (
            not torch.is_grad_enabled()
            or weight.numel() >= SMALLEST_WEIGHT
            or x.numel() * len(weight) >= SMALLEST_PRODUCT
        )
    )


def integer_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: LayerSettings,
    limits: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` with quantized weight and input, and straight-through gradients.

    Args:
        x: (…, inputs).
        weight: (outputs, inputs), the latent one; :func:`takes_integers` must accept it.
        bias: (outputs,) or none.
        settings: how both are quantized.
        limits: lowest and highest value of a static range.

    Returns:
        (…, outputs), in the type of ``x``, or in that of autocast.
    """
    largest = None if limits is None else torch.maximum(limits[0].abs(), limits[1].abs()).float()
    quantized = quantized_weight(weight, settings.weight)
    y = _IntegerLinear.apply(x, weight, bias, quantized, settings, limits, largest)
    return y.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else y  # type: ignore[no-any-return]


def quantized_weight(weight: torch.Tensor, settings: WeightSettings) -> ArrangedWeight:
    """Return a quantized weight; the one of the last call, if the weight is what it was then.

    That is told by its content: an edit through ``.data``, as some optimizers and averages make, leaves no other trace.
    Between two optimizer steps a weight is so quantized once, however many batches are accumulated.
    """
    content = training.checksum(weight)
    kept: ArrangedWeight | None = _kept.get(weight)
    if kept is not None and kept.checksum == content and kept.settings == settings:
        return kept
    stored = training.quantize_weight(weight, **fused_weight_arguments(weight, settings))
    arranged, scale = arrange_weight(stored.codes, stored.scale, settings.bits)
    found = ArrangedWeight(settings, content, stored, arranged, scale)
    _kept[weight] = found
    return found


class _IntegerLinear(Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by their places
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        quantized: ArrangedWeight,
        settings: LayerSettings,
        limits: tuple[torch.Tensor, torch.Tensor] | None,
        largest: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quantized, ctx.settings = quantized, settings
        # A static range goes on moving before the backward pass.
        ctx.limits = None if limits is None else tuple(limit.clone() for limit in limits)
        return multiply_integers(x.detach(), (quantized.arranged, quantized.scale), bias, settings, largest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        settings: LayerSettings = ctx.settings
        assert settings.activation is not None
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_weight = of_bias = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = _inside(ctx.quantized.multiply_rows(rows).view(x.shape), x, settings.activation)
            if ctx.needs_input_grad[1]:
                inputs = fake_quantize_activation(x, settings.activation, *(ctx.limits or (None, None)))
                of_weight = (rows.t() @ inputs.reshape(-1, x.shape[-1]).to(rows.dtype)).to(weight.dtype)
                of_weight = _inside(of_weight, weight, settings.weight)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0, dtype=torch.float32)
        return of_x, of_weight, of_bias, None, None, None, None


def _inside(
    gradient: torch.Tensor, values: torch.Tensor, settings: WeightSettings | ActivationSettings
) -> torch.Tensor:
    """Return the gradient, zero where values were clamped."""
    return gradient if settings.clip is None else gradient * (values.abs() <= settings.clip)
