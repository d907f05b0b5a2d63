"""The forms that one matrix may take at a given number of bytes, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.decomposition import Cores, rebuild
from fiftyfold.modules.tensor_network.factors import Sites, even_sites, skewed_sites
from fiftyfold.modules.tensor_network.form import NetworkForm, Term, clipped_bonds, low_rank_term
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.solvers import SWEEPS, principal_outputs, solve

Family = Literal["svd", "mpo2", "mpo3", "sum20", "sum50"]
"""``svd``: two thin matrices. ``mpo2``, ``mpo3``: a chain of cores. ``sum20``, ``sum50``: two thin matrices, and a
chain of two cores that takes 20 or 50 % of the bytes. Where a chain cuts is searched for."""

FAMILIES: tuple[Family, ...] = get_args(Family)

_SHARES: dict[Family, float] = {"svd": 0.0, "mpo2": 1.0, "mpo3": 1.0, "sum20": 0.2, "sum50": 0.5}
_SEARCH_SWEEPS = 1
_LARGEST_GAIN = 2
"""What is more than so many times as far, squared, as another family after the first sweep does not overtake it."""

_Solved = tuple[float, NetworkForm, list[Cores]]


def has_chain(families: Sequence[Family]) -> bool:
    """Tell whether one of the families cuts the channels into runs, so that their order matters."""
    return any(_SHARES[family] > 0 for family in families)


def form_of_family(
    shape: tuple[int, int], family: Family, size: float, bits: int, sites: Sites | None = None
) -> NetworkForm | None:
    """Return the largest form of a family that is stored in at most so many bytes; nothing if there is none.

    Args:
        shape: outputs and inputs.
        family: which.
        size: bytes, the rows of identity blocks included.
        bits: of one number.
        sites: where the family's chain, if it has one, cuts the matrix; by default into even cores.
    """
    share, terms = _SHARES[family], []
    if share:
        chain = _largest_chain(shape, sites or even_sites(shape, _cores(family)), size * share, bits)
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


def forms_of_family(shape: tuple[int, int], family: Family, size: float, bits: int) -> list[NetworkForm]:
    """Return what :func:`form_of_family` does for each way to cut that is worth a trial, the even one first."""
    cuts: list[Sites | None] = [None]
    if _SHARES[family]:
        cuts += skewed_sites(shape, _cores(family))
    forms = [form_of_family(shape, family, size, bits, sites) for sites in cuts]
    return [form for form in forms if form is not None]


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
    solved: list[_Solved] = []
    for family in families:
        bound = min((error for error, _, _ in solved), default=math.inf) * _LARGEST_GAIN
        solved += _best_cut(matrix, metric, forms_of_family(shape, family, size, bits), sweeps, bound)
    if not solved:
        raise FiftyfoldError(f"no form of a matrix {shape} fits into {size:.0f} bytes; raise keep.")
    _, form, networks = min(solved, key=lambda entry: entry[0])
    return form, networks


def _best_cut(
    matrix: torch.Tensor, metric: Metric, forms: Sequence[NetworkForm], sweeps: int, bound: float
) -> list[_Solved]:
    """Solve for the form that is nearest after the first sweep, and for the first form, and return the nearer.

    Nothing is returned if there is no form, or none comes within the bound in the first sweep. Where there is no other
    sweep, the first form alone is tried.
    """
    if len(forms) <= 1 or sweeps <= _SEARCH_SWEEPS:
        return [_solved(matrix, metric, form, sweeps) for form in forms[:1]]
    trials = [_solved(matrix, metric, form, _SEARCH_SWEEPS) for form in forms]
    nearest = min(trials, key=lambda entry: entry[0])
    if nearest[0] > bound:
        return []
    finals = {id(trial): trial for trial in (trials[0], nearest)}.values()
    solved = (_solved(matrix, metric, form, sweeps - _SEARCH_SWEEPS, start) for _, form, start in finals)
    return [min(solved, key=lambda entry: entry[0])]


def _solved(
    matrix: torch.Tensor, metric: Metric, form: NetworkForm, sweeps: int, start: list[Cores] | None = None
) -> _Solved:
    networks = solve(matrix, form, metric, sweeps, start)
    return metric.squared(matrix - whole_matrix(networks, form.shape)), form, networks


def whole_matrix(networks: Sequence[Cores], shape: tuple[int, int]) -> torch.Tensor:
    """Return the matrix that the cores of all terms of a form stand for."""
    first, *others = (rebuild(cores)[: shape[0], : shape[1]] for cores in networks)
    return sum(others, first)


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


def _cores(family: Family) -> int:
    return 3 if family == "mpo3" else 2


def _largest_chain(shape: tuple[int, int], sites: Sites, size: float, bits: int) -> Term | None:
    rows, columns = sites
    found, beyond = 0, math.prod(shape) + 1
    while beyond - found > 1:
        middle = (found + beyond) // 2
        bonds = clipped_bonds(rows, columns, [middle] * (len(rows) - 1))
        form = NetworkForm(shape, (Term(rows, columns, bonds),), "fixed")
        fits = max(bonds) == middle and form.stored_bytes(bits) <= size
        found, beyond = (middle, beyond) if fits else (found, middle)
    return Term(rows, columns, clipped_bonds(rows, columns, [found] * (len(rows) - 1))) if found else None
