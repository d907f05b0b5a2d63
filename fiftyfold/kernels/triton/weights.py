"""Fake quantization of weights on a GPU: two passes over memory, three for ternary weights.

Sums are finished in float64, as :mod:`fiftyfold.modules.quantization.quantizers` finishes them; the few numbers between
two passes are torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fiftyfold.kernels.division import divided
from fiftyfold.kernels.packing import largest_code
from fiftyfold.kernels.triton.activations import clamped, token_codes

LARGEST_CHUNK = 4096
TERNARY_THRESHOLD = 0.7

_LARGEST_FLOAT16 = 65504.0


@triton.jit
def _sum_kernel(
    weight: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    thresholds: tl.tensor,
    columns: tl.tensor,
    clip: tl.tensor,
    HAS_CLIP: tl.constexpr,
    BEYOND: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Add up the magnitudes of a group, or those beyond a threshold, and count these."""
    group = tl.program_id(0).to(tl.int64)
    weight += group * columns
    total = tl.zeros((CHUNK,), tl.float64)
    count = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        values = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        magnitudes = tl.abs(clamped(values, clip, HAS_CLIP))
        if BEYOND:
            kept = magnitudes > tl.load(thresholds + group * PER_GROUP)
            magnitudes = tl.where(kept, magnitudes, 0.0)
            count += kept.to(tl.int32)
        total += magnitudes.to(tl.float64)
    tl.store(sums + group, tl.sum(total, 0))
    if BEYOND:
        tl.store(counts + group, tl.sum(count, 0))


@triton.jit
def _largest_kernel(
    weight: tl.tensor,
    largest: tl.tensor,
    columns: tl.tensor,
    clip: tl.tensor,
    HAS_CLIP: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Find the largest magnitude of a group."""
    group = tl.program_id(0).to(tl.int64)
    weight += group * columns
    found = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        values = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        values = tl.abs(clamped(values, clip, HAS_CLIP))
        found = tl.maximum(found, values.to(tl.int32, bitcast=True))
    tl.store(largest + group, tl.max(found, 0).to(tl.float32, bitcast=True))


@triton.jit
def _write_kernel(
    weight: tl.tensor,
    y: tl.tensor,
    scales: tl.tensor,
    thresholds: tl.tensor,
    columns: tl.tensor,
    clip: tl.tensor,
    highest: tl.tensor,
    HAS_CLIP: tl.constexpr,
    BITS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write codes times scales."""
    group = tl.program_id(0).to(tl.int64)
    weight += group * columns
    y += group * columns
    scale = tl.load(scales + group * PER_GROUP).to(tl.float32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = column < columns
        values = clamped(tl.load(weight + column, mask=inside, other=0.0).to(tl.float32), clip, HAS_CLIP)
        if BITS == 1:
            codes = tl.where(values < 0, -1.0, 1.0)
        elif BITS == 2:
            threshold = tl.load(thresholds + group * PER_GROUP)
            codes = tl.where(values > threshold, 1.0, 0.0) - tl.where(values < -threshold, 1.0, 0.0)
        else:
            codes = token_codes(values, scale, -highest, highest)
        values = codes * scale
        if y.dtype.element_ty == tl.float16:
            values = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
        tl.store(y + column, values.to(y.dtype.element_ty), mask=inside)


def fake_quantize_weight(
    weight: torch.Tensor, *, bits: int, groups: int, per_tensor: bool, clip: float | None
) -> torch.Tensor:
    """Quantize and dequantize a weight.

    Args:
        weight: (outputs, inputs), contiguous, any floating-point type.
        bits: 1 (binary), 2 (ternary), 3, 4 or 8 (uniform).
        groups: of inputs that share a scale, in each output.
        per_tensor: one scale for all.
        clip: clamp to ``[-clip, clip]`` first.

    Returns:
        Of the shape and type of ``weight``.
    """
    rows = len(weight) * groups
    columns = weight.shape[1] // groups
    options = {
        "clip": 0.0 if clip is None else clip,
        "HAS_CLIP": clip is not None,
        "CHUNK": min(LARGEST_CHUNK, triton.next_power_of_2(columns)),
        "enable_fp_fusion": False,
    }
    y = torch.empty_like(weight)
    entries = columns * (rows if per_tensor else 1)
    with torch.cuda.device_of(weight):
        thresholds = y
        if bits > 2:
            largest = weight.new_empty(rows, dtype=torch.float32)
            _largest_kernel[(rows,)](weight, largest, columns, **options)
            largest = largest.amax(0, keepdim=True) if per_tensor else largest
            scale = divided(largest, largest_code(bits)).clamp_(min=2.0 ** (bits - 25))
        else:
            sums = weight.new_empty(rows, dtype=torch.float64)
            _sum_kernel[(rows,)](weight, sums, y, y, columns, BEYOND=False, PER_GROUP=0, **options)
            total = sums.sum(0, keepdim=True) if per_tensor else sums
            scale = divided(total, entries)
            if bits == 2:
                thresholds = (total * (TERNARY_THRESHOLD / entries)).float()
                counts = weight.new_empty(rows, dtype=torch.int32)
                kind = {"BEYOND": True, "PER_GROUP": int(not per_tensor)}
                _sum_kernel[(rows,)](weight, sums, counts, thresholds, columns, **kind, **options)
                total, count = (found.sum(0, keepdim=True) if per_tensor else found for found in (sums, counts))
                # Nothing is beyond a threshold that is not finite; the weight must show it all the same.
                scale = (total / count.clamp(min=1)).masked_fill(~thresholds.isfinite(), torch.nan)
        stored = scale.clamp(max=_LARGEST_FLOAT16).to(torch.float16)
        _write_kernel[(rows,)](
            weight, y, stored, thresholds, columns, highest=float(largest_code(bits)), BITS=bits,
            PER_GROUP=int(not per_tensor), **options,
        )  # fmt: skip
    return y
