"""Symmetric quantization of a layer's input: the arithmetic that training and the integer path have in common."""

from __future__ import annotations

import torch

from fiftyfold.kernels.division import divided

# The smallest normal float32: a row of zeros then gives codes of 0, and no division by zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def code_bounds(bits: int, full_range: bool) -> tuple[int, int]:
    """Return the lowest and highest code of a symmetric grid: -128 and 127, or -127 and 127, for 8 bits.

    16 bits end at 127 * 257, up to where a code is 256 times one of 8 bits, plus one of 8 bits: integer products take
    them in two passes.
    """
    if bits == 16:
        return -127 * 257, 127 * 257
    half = 2 ** (bits - 1)
    return (-half if full_range else 1 - half), half - 1


def symmetric_scale(largest: torch.Tensor, bits: int, full_range: bool) -> torch.Tensor:
    """Return the distance between neighbours of a symmetric grid, float32.

    Args:
        largest: largest magnitude, float32.
        bits: number of bits.
        full_range: divide by ``2**(bits - 1)``, as XTC's code does, and not by one less.
    """
    lowest, _ = code_bounds(bits, full_range)
    return divided(largest, -lowest).clamp_(min=SMALLEST_SCALE)


def symmetric_codes(x: torch.Tensor, scale: torch.Tensor, bits: int, full_range: bool) -> torch.Tensor:
    """Return the codes of ``x``, rounded half to even and clamped to the grid, as integers in float32.

    Args:
        x: float32.
        scale: broadcastable to ``x``.
        bits: number of bits.
        full_range: as for :func:`symmetric_scale`.
    """
    return torch.div(x, scale).round_().clamp_(*code_bounds(bits, full_range))


def token_magnitudes(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each token: the shape of ``x``, with 1 for its last dimension."""
    return x.abs().amax(dim=-1, keepdim=True)
