"""Rounding a whole matrix to its grid so that the layer's outputs, not its weights, change least.

The columns are rounded one after another, and what is still free makes up for each error in the metric of the inputs
(GPTQ: Frantar et al., 2022, arXiv 2210.17323, section 3). The result lies on the grid that :func:`.quantize_weight`
finds for it, so that it passes through the quantizer unchanged (but for the rounding of a weight's own type, where that
is narrower than float32), and training may begin from there.
"""

from __future__ import annotations

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import largest_code
from fiftyfold.modules.quantization.quantizers import smallest_step

DAMPING = 1e-2
"""Share of the mean squared input that is added to every direction, lest rare directions take up all errors."""

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Ends of the grid that are tried, as shares of a row's largest magnitude: few bits gain from a finer grid."""

_LARGEST_DAMPING = 1e3
_BLOCK = 128


def round_to_grid(weight: torch.Tensor, moment: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weight rounded to a uniform grid by row, nearest in the metric of its inputs.

    Args:
        weight: (outputs, inputs), finite.
        moment: E[xxᵀ] of the inputs x, (inputs, inputs), or any multiple of it.
        bits: 3, 4 or 8.

    Returns:
        In the weight's type. Each row but the very small holds its grid's end, so that the grid can be found again.

    Raises:
        FiftyfoldError: if the moment is none.
    """
    exact, moment = weight.double(), moment.double()
    level = largest_code(bits)
    scale = _row_scales(exact, moment.diagonal(), bits)
    # A row too small for finer steps keeps its step, whichever codes it has.
    ends = _ends(exact) * (scale > smallest_step(bits))
    # What the inputs excite most is rounded first, while most is free to make up for it.
    order = moment.diagonal().argsort(descending=True)
    codes = torch.empty_like(exact)
    codes[:, order] = _feed_errors(exact[:, order], scale, ends[:, order], moment[order][:, order], level)
    return (codes * scale).to(weight.dtype)


def _ends(weight: torch.Tensor) -> torch.Tensor:
    """Return in which entry each row's code is the grid's end, and of which sign: (rows, columns), mostly zeros."""
    places = weight.abs().argmax(dim=1, keepdim=True)
    return torch.zeros_like(weight).scatter_(1, places, weight.gather(1, places).sign())


def _row_scales(weight: torch.Tensor, strengths: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the step of each row's grid, (rows, 1), as float16 holds it, by the error of rounding to the nearest."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    level, most = largest_code(bits), torch.finfo(torch.float16).max
    best, found = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for shrink in _SHRINKS:
        scale = (largest * (shrink / level)).clamp(smallest_step(bits), most).half().to(weight.dtype)
        codes = (weight / scale).round().clamp(-level, level)
        error = ((weight - codes * scale).square() * strengths).sum(dim=1, keepdim=True)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


def _feed_errors(
    weight: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor, moment: torch.Tensor, level: int
) -> torch.Tensor:
    """Return codes, column after column, each error fed forward to the columns that follow."""
    rest, codes = weight.clone(), torch.empty_like(weight)
    feedback = _feedback(moment)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for column in range(start, stop):
            nearest = (rest[:, column] / scale[:, 0]).round().clamp(-level, level)
            codes[:, column] = torch.where(ends[:, column] != 0, ends[:, column] * level, nearest)
            error = (rest[:, column] - codes[:, column] * scale[:, 0]) / feedback[column, column]
            rest[:, column + 1 : stop].addr_(error, feedback[column, column + 1 : stop], alpha=-1)
            errors[:, column - start] = error
        rest[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    return codes


def _feedback(moment: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped moment's inverse."""
    damped = (moment + moment.T) / 2
    mean = float(damped.diagonal().mean())
    # Inputs that are always zero tell nothing: every direction then counts the same.
    damped = damped / mean if mean > 0 else torch.zeros_like(damped)
    damping = DAMPING if mean > 0 else 1.0
    # Moments of few tokens in float32 may be indefinite by more than the damping.
    while damping < _LARGEST_DAMPING:
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            feedback: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
            return feedback
        damping *= 10
    raise FiftyfoldError("the second moment of a layer's inputs is no sum of squares; calibrate on other text.")
