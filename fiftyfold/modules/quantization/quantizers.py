"""The arithmetic of quantization: codes and scales of weights, fake quantization of weights and inputs.

Weights are binary (BWN), ternary (TWN) or uniform, as in XTC (Wu et al., 2022, arXiv 2206.01859, section 3.1). They
are two-dimensional here, one row per output channel; the caller transposes layers that store them otherwise.

Three choices differ from the code published with the paper, so that a file can hold the result exactly:

* A zero weight is +1 in a binary weight; there it stays 0, which one bit cannot express.
* Scales are rounded to float16 where they are computed. Sums are finished in float64, so that a row alone gets the
  same codes and scale as the row in its matrix, and so that they hardly ever depend on the device.
* The uniform grid ends at the largest magnitude, with codes ``±(2**(bits - 1) - 1)``. Quantizing a quantized weight
  again then gives it back; on the published grid, with its scale of ``2 * max / 2**bits``, the largest positive weight
  shrinks each time.

All of them give finite results on finite inputs, groups of zeros and constant groups included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch.autograd import Function

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import training
from fiftyfold.kernels.activations import SMALLEST_SCALE, symmetric_codes, symmetric_scale, token_magnitudes
from fiftyfold.kernels.division import divided
from fiftyfold.kernels.packing import largest_code
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings

TERNARY_THRESHOLD = 0.7
"""Share of the mean magnitude below which a ternary weight is 0 (Li et al., 2016, TWN)."""

_LARGEST_FLOAT16 = torch.finfo(torch.float16).max

# The zero point of an asymmetric grid stays an integer that float32 holds exactly, with the codes added to it.
_FINEST_RELATIVE_STEP = 2.0**-20

_Quantizer = Callable[[torch.Tensor, int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]]


def check_shape(shape: tuple[int, ...] | torch.Size, settings: WeightSettings) -> None:
    """Refuse a weight that the settings do not fit.

    Raises:
        FiftyfoldError: if the weight is empty or not a matrix, or its rows cannot be cut into the groups.
    """
    if len(shape) != 2 or 0 in shape:
        raise FiftyfoldError(f"a weight to quantize must be a matrix with entries, not of shape {tuple(shape)}.")
    if settings.group_size is not None and shape[1] % settings.group_size:
        raise FiftyfoldError(
            f"group_size {settings.group_size} does not divide the {shape[1]} inputs of the layer; "
            "choose a divisor, or leave the layer out with exclude."
        )


def scale_shape(shape: tuple[int, ...] | torch.Size, settings: WeightSettings) -> tuple[int, int]:
    """Return the shape of the scales of a (rows, columns) weight: (1, 1), (rows, 1) or (rows, groups)."""
    rows, columns = shape
    if settings.granularity == "per_tensor":
        return 1, 1
    return rows, 1 if settings.group_size is None else columns // settings.group_size


def quantize_weight(weight: torch.Tensor, settings: WeightSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of a weight.

    Args:
        weight: (rows, columns), one row per output channel; any floating-point type.
        settings: how to quantize it.

    Returns:
        The codes, int8 with the shape of ``weight``, and the scales, float16 with :func:`scale_shape`.

    Raises:
        FiftyfoldError: if the settings do not fit the shape, or the weight has an entry that is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise FiftyfoldError("a weight to quantize has entries that are not finite; the training has diverged.")
    if training.is_native(weight):
        check_shape(weight.shape, settings)
        found = training.quantize_weight(weight.detach(), **fused_weight_arguments(weight, settings))
        return found.codes, found.scale
    codes, scale = _quantize(weight.detach(), settings)
    return codes.flatten(1).to(torch.int8), scale.flatten(1)


def smallest_step(bits: int) -> float:
    """Return the least step of a uniform grid.

    Below it float16 is so coarse that rounding the scale would move the largest weight to another code, and quantizing
    twice would differ from quantizing once.
    """
    return float(2.0 ** (bits - 25))


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight that codes and scales stand for.

    Args:
        codes: (rows, columns), integers of any type.
        scale: float16, as :func:`quantize_weight` returns it.
        dtype: type of the result; the product is taken in float32, and kept within the type's finite range.
    """
    grouped = codes.unflatten(1, (scale.shape[1], -1)).to(torch.float32, copy=True)
    return _in_type(grouped.mul_(scale.float().unsqueeze(2)).flatten(1), dtype)


def fake_quantize_weight(weight: torch.Tensor, settings: WeightSettings) -> torch.Tensor:
    """Quantize and dequantize a weight, with straight-through gradients.

    Equals ``dequantize_weight(*quantize_weight(weight, settings), weight.dtype)`` exactly. The gradient passes
    unchanged; with ``settings.clip``, it is zero where the magnitude exceeds it.

    Args:
        weight: (rows, columns), one row per output channel.
        settings: how to quantize it.
    """
    return _FakeQuantizeWeight.apply(weight, settings)  # type: ignore[no-any-return]


def fake_quantize_activation(
    x: torch.Tensor,
    settings: ActivationSettings,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize the input of a layer, with straight-through gradients.

    Args:
        x: (…, features), any floating-point type; the arithmetic is in float32.
        settings: how to quantize it. A dynamic range is one per token, that is, over the last dimension.
        low: lowest observed value, for a static range.
        high: highest observed value, for a static range.
    """
    if x.numel() == 0:
        return x
    return _FakeQuantizeActivation.apply(x, settings, low, high)  # type: ignore[no-any-return]


class FusedWeightArguments(TypedDict):
    """The settings of a weight, as the fused kernels take them."""

    bits: int
    groups: int
    per_tensor: bool
    clip: float | None


def fused_weight_arguments(weight: torch.Tensor, settings: WeightSettings) -> FusedWeightArguments:
    """Return the arguments of :func:`fiftyfold.kernels.training.quantize_weight`."""
    return {
        "bits": settings.bits,
        "groups": scale_shape(weight.shape, settings)[1],
        "per_tensor": settings.granularity == "per_tensor",
        "clip": settings.clip,
    }


class _FakeQuantizeWeight(Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, settings: WeightSettings) -> torch.Tensor:
        ctx.clip = settings.clip
        if settings.clip is not None:
            ctx.save_for_backward(weight)
        if training.is_fused(weight):
            check_shape(weight.shape, settings)
            return training.fake_quantize_weight(weight, **fused_weight_arguments(weight, settings))
        codes, scale = _quantize(weight, settings)
        return _in_type(codes.mul_(scale.float()).flatten(1), weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.clip is not None:
            (weight,) = ctx.saved_tensors
            gradient = gradient * (weight.abs() <= ctx.clip)
        return gradient, None


class _FakeQuantizeActivation(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        settings: ActivationSettings,
        low: torch.Tensor | None,
        high: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.clipped = settings.clip is not None
        if settings.clip is not None:
            ctx.save_for_backward(x.abs() <= settings.clip)
        if settings.symmetric and training.is_fused(x):
            return training.fake_quantize_tokens(
                x,
                bits=settings.bits,
                full_range=settings.full_range,
                clip=settings.clip,
                largest=None if low is None or high is None else torch.maximum(low.abs(), high.abs()),
            )
        values = x.float()
        if settings.clip is not None:
            values = values.clamp(-settings.clip, settings.clip)
        if settings.symmetric:
            return _in_type(_on_symmetric_grid(values, settings, low, high), x.dtype)
        # The zero point is rounded, so the grid may reach beyond the input by half a step, and beyond its type.
        limit = torch.finfo(x.dtype).max
        return _on_asymmetric_grid(values, settings, low, high).clamp_(-limit, limit).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.clipped:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None


def _quantize(weight: torch.Tensor, settings: WeightSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 codes (rows, groups, columns of a group) and float16 scales that broadcast to them."""
    check_shape(weight.shape, settings)
    values = weight.float()
    if settings.clip is not None:
        values = values.clamp(-settings.clip, settings.clip)
    _, groups = scale_shape(weight.shape, settings)
    shared = (0, 1, 2) if settings.granularity == "per_tensor" else (2,)
    return _QUANTIZERS[settings.bits](values.unflatten(1, (groups, -1)), settings.bits, shared)


def _binary(values: torch.Tensor, _: int, shared: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to ``mean(|w|) * sign(w)``, the binary weights of XTC."""
    magnitudes = values.abs()
    scale = divided(_sum(magnitudes, shared), _entries(values, shared))
    # Adding zero turns -0.0 into +0.0, so that every zero is +1.
    return torch.copysign(values.new_ones(()), torch.add(values, 0.0, out=magnitudes)), _stored(scale)


def _ternary(values: torch.Tensor, _: int, shared: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to 0 up to a threshold, and to the mean magnitude of the rest beyond it, the ternary weights of XTC."""
    magnitudes = values.abs()
    threshold = (_sum(magnitudes, shared) * (TERNARY_THRESHOLD / _entries(values, shared))).float()
    # A float mask, because arithmetic with bools is several times slower on CPUs.
    beyond = torch.gt(magnitudes, threshold, out=torch.empty_like(magnitudes))
    scale = _sum(magnitudes.mul_(beyond), shared) / _sum(beyond, shared).clamp_(min=1)
    return torch.sign(values, out=magnitudes).mul_(beyond), _stored(scale)


def _uniform(values: torch.Tensor, bits: int, shared: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to the nearest point of a symmetric grid that ends at the largest magnitude."""
    largest = largest_code(bits)
    scale = divided(values.abs().amax(shared, keepdim=True), largest)
    stored = _stored(scale.clamp_(min=smallest_step(bits)))
    return torch.div(values, stored.float()).round_().clamp_(-largest, largest), stored


_QUANTIZERS: dict[int, _Quantizer] = {1: _binary, 2: _ternary, 3: _uniform, 4: _uniform, 8: _uniform}


def _entries(values: torch.Tensor, shared: tuple[int, ...]) -> int:
    # A list: torch.compile cannot take a generator through an autograd function.
    return math.prod([values.shape[dimension] for dimension in shared])


def _sum(values: torch.Tensor, shared: tuple[int, ...]) -> torch.Tensor:
    """Sum over ``shared`` dimensions, nearly independent of the order in which a device adds."""
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    if len(shared) == 1:
        return values.sum(shared, keepdim=True, dtype=exact)
    # The errors of many rows' float32 sums average out; float64 throughout costs five times as much.
    return values.sum(shared[-1:], keepdim=True).sum(shared[:-1], keepdim=True, dtype=exact)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(max=_LARGEST_FLOAT16).to(torch.float16)


def _in_type(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 ``values`` as ``dtype``; their place is taken.

    A grid that ends at float16's largest number may reach beyond it by the rounding of its scale; no other type is so
    narrow.
    """
    if dtype == torch.float16:
        values.clamp_(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return values.to(dtype)


def _on_symmetric_grid(
    x: torch.Tensor, settings: ActivationSettings, low: torch.Tensor | None, high: torch.Tensor | None
) -> torch.Tensor:
    if low is None or high is None:
        largest = token_magnitudes(x)
    else:
        largest = torch.maximum(low.abs(), high.abs()).float()
    scale = symmetric_scale(largest, settings.bits, settings.full_range)
    return symmetric_codes(x, scale, settings.bits, settings.full_range).mul_(scale)


def _on_asymmetric_grid(
    x: torch.Tensor, settings: ActivationSettings, low: torch.Tensor | None, high: torch.Tensor | None
) -> torch.Tensor:
    if low is None or high is None:
        low, high = x.aminmax(dim=-1, keepdim=True)
    low, high = low.float(), high.float()
    levels = 2**settings.bits - 1
    steps = levels + settings.full_range
    finest = torch.maximum(low.abs(), high.abs()) * _FINEST_RELATIVE_STEP
    # Two quotients, because the difference of the bounds may exceed float32.
    scale = torch.maximum(divided(high, steps) - divided(low, steps), finest).clamp_(min=SMALLEST_SCALE)
    zero_point = torch.round(low / scale)
    codes = torch.div(x, scale).round_().sub_(zero_point).clamp_(0, levels)
    return codes.add_(zero_point).mul_(scale)
