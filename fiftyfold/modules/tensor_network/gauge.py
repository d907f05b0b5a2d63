"""Fixing the gauge: the same operator with an identity block at each bond, which then need not be stored.

Between two cores any invertible matrix and its inverse may stand; a bond of size χ so carries χ² numbers that mean
nothing. Here they are spent on making χ rows of the core on the left an identity. Which rows: those whose block has,
nearly, the largest volume (Goreinov et al., "How to find a good submatrix"), so that no other entry exceeds 1 by more
than a twentieth, and dividing by the block loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fiftyfold.modules.tensor_network.decomposition import Cores
from fiftyfold.modules.tensor_network.form import Term

LARGEST_ENTRY = 1.05
"""Bound on what is stored beside an identity block."""

_LARGEST_SWAPS = 5000


def fix_gauge(cores: Cores) -> tuple[Cores, list[torch.Tensor]]:
    """Return the same operator with identity blocks, and which rows they are.

    Cores that hold identity blocks already stay exactly as they are.

    Args:
        cores: of one term, in any floating-point type; computed in float64.

    Returns:
        Cores in the type of the given ones, and for each bond the rows of the left core, unfolded to (left bond ·
        outputs · inputs, bond), that are the identity, in its order.
    """
    fixed, pivots = [core.double() for core in cores], []
    for index in range(len(cores) - 1):
        core, following = fixed[index], fixed[index + 1]
        unfolded = core.flatten(0, 2)
        rows = identity_rows(unfolded)
        if rows is None:
            basis, triangle = torch.linalg.qr(unfolded)
            rows = dominant_rows(basis)
            block = basis[rows]
            unfolded = torch.linalg.solve(block, basis, left=False)
            unfolded[rows] = torch.eye(len(rows), dtype=unfolded.dtype, device=unfolded.device)
            fixed[index] = unfolded.view(core.shape)
            fixed[index + 1] = (block @ triangle @ following.flatten(1)).view(following.shape)
        pivots.append(rows)
    return [core.to(given.dtype) for core, given in zip(fixed, cores, strict=True)], pivots


def dominant_rows(basis: torch.Tensor) -> torch.Tensor:
    """Return as many rows of a tall matrix as it has columns, so that all others are small combinations of them.

    Args:
        basis: (rows, columns), of full column rank.

    Returns:
        (columns,) row numbers.
    """
    count = basis.shape[1]
    order = torch.arange(len(basis), device=basis.device)
    for place, other in enumerate(torch.linalg.lu_factor(basis)[1].tolist()):
        order[[place, other - 1]] = order[[other - 1, place]]
    rows = order[:count].clone()
    combination = torch.linalg.solve(basis[rows], basis, left=False)
    for _ in range(_LARGEST_SWAPS):
        row, column = divmod(int(combination.abs().argmax()), count)
        largest = combination[row, column]
        if abs(float(largest)) <= LARGEST_ENTRY:
            break
        change = combination[row].clone()
        change[column] -= 1
        rows[column] = row
        combination.sub_(torch.outer(combination[:, column] / largest, change))
    return rows


def identity_rows(unfolded: torch.Tensor) -> torch.Tensor | None:
    """Return the rows of a matrix that are those of the identity, in its order; nothing if one is missing."""
    single = (unfolded.count_nonzero(dim=1) == 1).nonzero().flatten()
    is_unit = unfolded[single].amax(dim=1) == 1
    single = single[is_unit]
    places = unfolded[single].argmax(dim=1)
    rows = torch.full((unfolded.shape[1],), -1, dtype=torch.long, device=unfolded.device)
    # Backwards, so that the first of several such rows is kept.
    for place, row in zip(places.tolist()[::-1], single.tolist()[::-1], strict=True):
        rows[place] = row
    return None if bool((rows < 0).any()) else rows


def split_free(cores: Cores) -> list[torch.Tensor]:
    """Return the matrices that cores are kept as in a free gauge."""
    return [*(core.flatten(0, 2) for core in cores[:-1]), cores[-1].flatten(1)]


def split_fixed(cores: Cores, pivots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the matrices that cores with identity blocks are kept as: without those blocks."""
    matrices = []
    for core, rows in zip(cores[:-1], pivots, strict=True):
        unfolded = core.flatten(0, 2)
        kept = torch.ones(len(unfolded), dtype=torch.bool, device=core.device)
        kept[rows] = False
        matrices.append(unfolded[kept])
    return [*matrices, cores[-1].flatten(1)]


def join_free(matrices: Sequence[torch.Tensor], term: Term) -> Cores:
    """Return the cores that :func:`split_free` split."""
    return [matrix.view(shape) for matrix, shape in zip(matrices, term.core_shapes, strict=True)]


def join_fixed(matrices: Sequence[torch.Tensor], places: Sequence[torch.Tensor], term: Term) -> Cores:
    """Return the cores that :func:`split_fixed` split.

    Args:
        matrices: as they are kept.
        places: for each bond, from :func:`row_places`.
        term: of the cores.
    """
    cores = []
    for matrix, where, shape in zip(matrices[:-1], places, term.core_shapes[:-1], strict=True):
        unit = torch.eye(shape[3], dtype=matrix.dtype, device=matrix.device)
        cores.append(torch.cat([unit, matrix])[where].view(shape))
    return [*cores, matrices[-1].view(term.core_shapes[-1])]


def row_places(pivots: torch.Tensor, rows: int) -> torch.Tensor:
    """Return where each row of an unfolded core is found when its identity block stands before the rest.

    Args:
        pivots: (bond,) rows of the identity.
        rows: of the unfolded core.
    """
    where = torch.zeros(rows, dtype=torch.long, device=pivots.device)
    where[pivots.long()] = 1
    places = torch.cumsum(1 - where, dim=0) + len(pivots) - 1
    places[pivots.long()] = torch.arange(len(pivots), device=pivots.device)
    return places
