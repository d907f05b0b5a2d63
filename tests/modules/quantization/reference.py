"""XTC's quantizers a second time: float64, plain loops over groups, written from the paper's equations (section 3.1).

Scales are not rounded to float16 here, so scales agree within half a unit in float16's last place.
"""

import math

import numpy as np


def groups_of(weight, granularity, group_size):
    """Cut a matrix into the lists of (row, column) that share a scale."""
    rows, columns = weight.shape
    if granularity == "per_tensor":
        return [[(r, c) for r in range(rows) for c in range(columns)]]
    size = columns if granularity == "per_channel" else group_size
    return [[(r, c) for c in range(start, start + size)] for r in range(rows) for start in range(0, columns, size)]


def quantize(weight, bits, granularity="per_tensor", group_size=None):
    """Return integer codes of the weight's shape and a flat list of scales, one per group."""
    weight = np.asarray(weight, dtype=np.float64)
    codes = np.zeros(weight.shape, dtype=np.int64)
    scales = []
    for group in groups_of(weight, granularity, group_size):
        values = [weight[place] for place in group]
        group_codes, scale = _QUANTIZE(values, bits)
        scales.append(scale)
        for place, code in zip(group, group_codes, strict=True):
            codes[place] = code
    return codes, scales


def _QUANTIZE(values, bits):  # noqa: N802
    if bits == 1:
        return [1 if v >= 0 else -1 for v in values], math.fsum(abs(v) for v in values) / len(values)
    if bits == 2:
        threshold = 0.7 * math.fsum(abs(v) for v in values) / len(values)
        kept = [abs(v) for v in values if abs(v) > threshold]
        codes = [0 if abs(v) <= threshold else int(math.copysign(1, v)) for v in values]
        return codes, math.fsum(kept) / len(kept) if kept else 0.0
    scale = max(abs(v) for v in values) / (2 ** (bits - 1) - 1)
    return [round(v / scale) if scale else 0 for v in values], scale


def quantize_tokens(x, bits, *, symmetric, full_range):
    """Quantize and dequantize each row by itself."""
    return np.stack([_token(row, bits, symmetric, full_range) for row in np.asarray(x, dtype=np.float64)])


def _token(row, bits, symmetric, full_range):
    if symmetric:
        half = 2 ** (bits - 1)
        scale = np.abs(row).max() / (half if full_range else half - 1)
        codes = np.clip(np.rint(row / scale), -half if full_range else 1 - half, half - 1)
        return codes * scale
    levels = 2**bits
    scale = (row.max() - row.min()) / (levels if full_range else levels - 1)
    zero = np.rint(row.min() / scale) * scale
    return np.clip(np.rint((row - zero) / scale), 0, levels - 1) * scale + zero
