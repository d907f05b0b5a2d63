"""The leading directions of a large symmetric operator, by block subspace iteration that checks itself.

Two steps from random directions, as is often done, find the leading ones of a spectrum that falls quickly, and mistake
those of a flat one, as that of a weight matrix often is. So the iteration goes on until it has stopped gaining, and
gives up where that takes longer than an exact decomposition. Half the smallest value found is subtracted from the
operator in each step, which about doubles the rate at which the last directions come forth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_SMALLEST_SIZE = 1536
_LARGEST_SHARE = 0.06
_LARGEST_STEPS = 24
_FIRST_CHECK = 4
_GAIN = 1e-4
_ROUNDING = 1e-7


def iteration_pays(size: int, count: int) -> bool:
    """Tell whether finding ``count`` of ``size`` directions is quicker by iteration than by an exact decomposition."""
    return size >= _SMALLEST_SIZE and count <= _LARGEST_SHARE * size


def leading_directions(
    multiply: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, size: int, count: int, total: float
) -> torch.Tensor | None:
    """Return orthonormal directions that hold as much of an operator's trace as so many can.

    The same numbers come on every rank: the random directions at the beginning have one seed.

    Args:
        multiply: the operator, symmetric and positive semidefinite: (size, n) → (size, n).
        like: a tensor of the type and on the device that it computes in.
        size: of its space.
        count: how many directions.
        total: its trace.

    Returns:
        (size, count), the strongest first; nothing if the second half of all steps still gains more than a
        ten-thousandth of what the directions leave out.
    """
    width = min(size, count + max(16, count // 10))
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(multiply(start.to(like)))[0]
    held: list[float] = []
    for step in range(_LARGEST_STEPS):
        image = multiply(basis)
        inner = (basis.T @ image).double()
        values, rotation = torch.linalg.eigh((inner + inner.T) / 2)
        values, rotation = values.flip(0).clamp(min=0), rotation.flip(1).to(like)
        held.append(float(values[:count].sum()))
        allowed = _GAIN * max(0.0, total - held[-1]) + _ROUNDING * total
        if step >= _FIRST_CHECK and held[-1] - held[step // 2] <= allowed:
            found: torch.Tensor = basis @ rotation[:, :count]
            return found
        basis = torch.linalg.qr(image @ rotation - basis @ rotation * (float(values[-1]) / 2))[0]
    return None
