"""The forms that one matrix may take at a given number of bytes, and the choice among them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.decomposition import Cores, rebuild
from fiftyfold.modules.tensor_network.factors import site_factors
from fiftyfold.modules.tensor_network.form import NetworkForm, Term, clipped_bonds, low_rank_term
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.solvers import SWEEPS, principal_outputs, solve

Family = Literal["svd", "mpo2", "mpo3", "sum20", "sum50"]
"""``svd``: two thin matrices. ``mpo2``, ``mpo3``: a chain of even cores. ``sum20``, ``sum50``: two thin matrices, and a
chain of two even cores that takes 20 or 50 % of the bytes."""

FAMILIES: tuple[Family, ...] = get_args(Family)

_SHARES: dict[Family, float] = {"svd": 0.0, "mpo2": 1.0, "mpo3": 1.0, "sum20": 0.2, "sum50": 0.5}


def form_of_family(shape: tuple[int, int], family: Family, size: float, bits: int) -> NetworkForm | None:
    """Return the largest form of a family that is stored in at most so many bytes; nothing if there is none.

    Args:
        shape: outputs and inputs.
        family: which.
        size: bytes, the rows of identity blocks included.
        bits: of one number.
    """
    share, terms = _SHARES[family], []
    if share:
        cores = 3 if family == "mpo3" else 2
        chain = _largest_chain(shape, cores, size * share, bits)
        if chain is None:
            return None
        terms.append(chain)
        size -= NetworkForm(shape, (chain,), "fixed").stored_bytes(bits)
    if share < 1:
        rank = largest_rank(shape, size, bits)
        if rank < 1:
            return None
        terms.insert(0, low_rank_term(shape, rank))
    return NetworkForm(shape, tuple(terms))


def largest_rank(shape: tuple[int, int], size: float, bits: int) -> int:
    """Return the largest rank whose two thin matrices, gauge fixed, take at most so many bytes; perhaps 0."""
    rank, beyond = 0, min(shape) + 1
    while beyond - rank > 1:
        middle = (rank + beyond) // 2
        form = NetworkForm(shape, (low_rank_term(shape, middle),), "fixed")
        rank, beyond = (middle, beyond) if form.stored_bytes(bits) <= size else (rank, middle)
    return rank


def best_form(
    matrix: torch.Tensor,
    metric: Metric,
    families: tuple[Family, ...],
    size: float,
    bits: int,
    *,
    sweeps: int = SWEEPS,
) -> tuple[NetworkForm, list[Cores]]:
    """Solve for the largest form of each family within so many bytes, and return the nearest in the metric.

    Raises:
        FiftyfoldError: if no family has a form that is so small.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    found: list[tuple[float, NetworkForm, list[Cores]]] = []
    for family in families:
        form = form_of_family(shape, family, size, bits)
        if form is not None:
            networks = solve(matrix, form, metric, sweeps)
            built = sum(rebuild(cores)[: shape[0], : shape[1]] for cores in networks)
            assert isinstance(built, torch.Tensor)
            found.append((metric.squared(matrix - built), form, networks))
    if not found:
        raise FiftyfoldError(f"no form of a matrix {shape} fits into {size:.0f} bytes; raise keep.")
    _, form, networks = min(found, key=lambda entry: entry[0])
    return form, networks


def low_rank_curve(matrix: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Return the squared relative error in the metric for every rank from 0 on, in closed form.

    Returns:
        (min(outputs, inputs) + 1,), falling from 1 to 0.
    """
    directions = principal_outputs(matrix, metric).T @ matrix
    energies = ((directions @ metric.moment) * directions).sum(1).double().clamp(min=0)
    total = energies.sum()
    if float(total) <= 0:
        return torch.zeros(len(energies) + 1, dtype=torch.float64)
    tails = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return tails / total


def _largest_chain(shape: tuple[int, int], cores: int, size: float, bits: int) -> Term | None:
    rows, columns = (site_factors(each, cores) for each in shape)
    found, beyond = 0, math.prod(shape) + 1
    while beyond - found > 1:
        middle = (found + beyond) // 2
        bonds = clipped_bonds(rows, columns, [middle] * (cores - 1))
        form = NetworkForm(shape, (Term(rows, columns, bonds),), "fixed")
        fits = max(bonds) == middle and form.stored_bytes(bits) <= size
        found, beyond = (middle, beyond) if fits else (found, middle)
    return Term(rows, columns, clipped_bonds(rows, columns, [found] * (cores - 1))) if found else None
