"""Quantization of activations on a GPU, a token a program: bit for bit what :mod:`fiftyfold.kernels.activations` does.

Two things need care. ``tl.max`` swallows NaN, so the largest magnitude is searched among the bit patterns, which are
ordered as the magnitudes are, with NaN above all. And ``/`` is approximate on a GPU; ``tl.div_rn`` is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fiftyfold.kernels.activations import SMALLEST_SCALE, code_bounds
from fiftyfold.kernels.triton.early_start import gdc_launch_dependents, starts_early
from fiftyfold.kernels.triton.planes import padded_inputs

LARGEST_CHUNK = 4096

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
# Adding and taking away 1.5 * 2**23 rounds half to even, exact for magnitudes below 2**22.
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def clamped(values: tl.tensor, clip: tl.tensor, HAS_CLIP: tl.constexpr) -> tl.tensor:
    """Clamp to ``[-clip, clip]``; NaN stays NaN."""
    if HAS_CLIP:
        values = tl.where(values > clip, clip, values)
        values = tl.where(values < -clip, -clip, values)
    return values


@triton.jit
def token_scale(
    x: tl.tensor,
    columns: tl.tensor,
    divisor: tl.tensor,
    clip: tl.tensor,
    largest: tl.tensor,
    HAS_CLIP: tl.constexpr,
    STATIC: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Return the distance between neighbours of a token's grid; NaN if its range is not finite."""
    if STATIC:
        bits = tl.load(largest).to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
    else:
        found = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            values = clamped(values, clip, HAS_CLIP)
            found = tl.maximum(found, values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS)
        bits = tl.max(found, 0)
    bits = tl.where(bits >= _INFINITY_BITS, _MAGNITUDE_BITS, bits)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), divisor)
    return tl.where(scale < _SMALLEST, _SMALLEST, scale)


@triton.jit
def token_codes(values: tl.tensor, scale: tl.tensor, lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """Return codes, as floats: clamped to the grid, which keeps the rounding exact, and rounded half to even."""
    quotient = tl.div_rn(values, scale)
    quotient = tl.where(quotient < lowest, lowest, quotient)
    quotient = tl.where(quotient > highest, highest, quotient)
    return (quotient + _ROUNDER) - _ROUNDER


@triton.jit
def _quantize_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    columns: tl.tensor,
    padded: tl.tensor,
    divisor: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    clip: tl.tensor,
    HAS_CLIP: tl.constexpr,
    STATIC: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    x += token * columns
    scale = token_scale(x, columns, divisor, clip, largest, HAS_CLIP, STATIC, CHUNK)
    total = tl.zeros((CHUNK,), tl.int32)
    strange = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, padded, CHUNK):
        column = start + tl.arange(0, CHUNK)
        values = clamped(tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32), clip, HAS_CLIP)
        found = token_codes(values, scale, lowest, highest)
        strange |= (found != found).to(tl.int32)
        found = tl.where(found == found, found, 0.0).to(tl.int32)
        total += found
        tl.store(codes + token * padded + column, found.to(tl.int8), mask=column < padded)
    # A scale that is not a number makes every output of the token so.
    tl.store(scales + token, tl.where(tl.max(strange, 0) > 0, float("nan"), scale))
    tl.store(sums + token, tl.sum(total, 0))


@triton.jit
def _fake_quantize_kernel(
    x: tl.tensor,
    y: tl.tensor,
    largest: tl.tensor,
    columns: tl.tensor,
    divisor: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    clip: tl.tensor,
    HAS_CLIP: tl.constexpr,
    STATIC: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    x += token * columns
    y += token * columns
    scale = token_scale(x, columns, divisor, clip, largest, HAS_CLIP, STATIC, CHUNK)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < columns
        values = clamped(tl.load(x + column, mask=inside, other=0.0).to(tl.float32), clip, HAS_CLIP)
        values = token_codes(values, scale, lowest, highest) * scale
        if y.dtype.element_ty == tl.float16:
            values = clamped(values, _LARGEST_FLOAT16, True)
        tl.store(y + column, values.to(y.dtype.element_ty), mask=inside)


class QuantizedTokens(NamedTuple):
    """Tokens as the products take them.

    Attributes:
        codes: int8, (tokens, inputs filled up with zeros to whole blocks of
            :data:`~fiftyfold.kernels.triton.planes.BLOCK`).
        scales: float32, (tokens,).
        sums: of the codes, int32, (tokens,).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor


def quantize_tokens(
    x: torch.Tensor,
    *,
    bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> QuantizedTokens:
    """Quantize each token on a symmetric grid.

    Args:
        x: (tokens, inputs), any floating-point type.
        bits: bits of the grid.
        full_range: whether the grid has one more negative code, as XTC's.
        clip: clamp the input to ``[-clip, clip]`` first.
        largest: the largest magnitude of a static range, a float32 scalar; by default each token's own.

    """
    x = x.contiguous()
    tokens, inputs = x.shape
    padded = padded_inputs(inputs)
    codes = x.new_empty((tokens, padded), dtype=torch.int8)
    scales = x.new_empty(tokens, dtype=torch.float32)
    sums = x.new_empty(tokens, dtype=torch.int32)
    if tokens:
        grid = _grid(x, bits, full_range, clip, largest)
        _quantize_kernel[(tokens,)](
            x, codes, scales, sums, grid.pop("largest"), inputs, padded, EARLY=starts_early(x.device),
            num_warps=8 if grid["CHUNK"] == LARGEST_CHUNK else 4, **grid,
        )  # fmt: skip
    return QuantizedTokens(codes, scales, sums)


def fake_quantize_tokens(
    x: torch.Tensor,
    *,
    bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize each token on a symmetric grid, in one pass over memory.

    Args:
        x: (…, inputs), any floating-point type.
        bits: as for :func:`quantize_tokens`, and so are the others.
        full_range: see there.
        clip: see there.
        largest: see there.

    Returns:
        Of the shape and type of ``x``.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        grid = _grid(x, bits, full_range, clip, largest)
        tokens = x.numel() // x.shape[-1]
        _fake_quantize_kernel[(tokens,)](x, y, grid.pop("largest"), x.shape[-1], **grid)
    return y


def _grid(
    x: torch.Tensor, bits: int, full_range: bool, clip: float | None, largest: torch.Tensor | None
) -> dict[str, Any]:
    lowest, highest = code_bounds(bits, full_range)
    return {
        "largest": x if largest is None else largest.float(),
        "divisor": float(-lowest),
        "lowest": float(lowest),
        "highest": float(highest),
        "clip": 0.0 if clip is None else float(clip),
        "HAS_CLIP": clip is not None,
        "STATIC": largest is not None,
        "CHUNK": min(LARGEST_CHUNK, triton.next_power_of_2(x.shape[-1])),
        "enable_fp_fusion": False,
    }
