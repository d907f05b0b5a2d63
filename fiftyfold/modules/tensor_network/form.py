"""The form of a tensor network: which cores stand in the place of a matrix. Plain integers that travel as JSON.

A matrix (outputs × inputs) is a sum of *terms*. Each term is a matrix product operator: outputs and inputs are cut into
the same number of sites, one core stands at each site, and neighbouring cores share a bond,

``W[o1…oN, i1…iN] = Σ A1[o1, i1, r1] · A2[r1, o2, i2, r2] · … · AN[r(N-1), oN, iN]``.

A product of two thin matrices is the term whose sites are (outputs, 1) and (1, inputs): low rank is no special case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.factors import site_factors

Gauge = Literal["free", "fixed"]
"""``free``: the cores hold all their numbers, as they train. ``fixed``: at each bond an identity block, which a bond of
size χ always allows, is left out, χ² numbers fewer."""

CoreShape = tuple[int, int, int, int]
"""(left bond, outputs, inputs, right bond)."""

_LARGEST_SITES = 64
_LARGEST_SIZE = 2**40


@dataclass(frozen=True)
class Term:
    """One matrix product operator.

    Attributes:
        rows: factors of the outputs, one for each core; their product is the number of outputs, or more where zeros
            fill it up.
        columns: factors of the inputs, likewise.
        bonds: sizes of the bonds between neighbouring cores, one fewer than there are cores.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    bonds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.rows) <= _LARGEST_SITES or len(self.columns) != len(self.rows):
            raise FiftyfoldError("a tensor network needs as many factors of the outputs as of the inputs.")
        if len(self.bonds) != len(self.rows) - 1:
            raise FiftyfoldError(f"{len(self.rows)} cores have {len(self.rows) - 1} bonds, not {len(self.bonds)}.")
        if any(type(size) is not int or size < 1 for size in (*self.rows, *self.columns)):
            raise FiftyfoldError(f"factors must be integers of at least 1, not {self.rows} and {self.columns}.")
        if any(type(bond) is not int or bond < 1 for bond in self.bonds):
            raise FiftyfoldError(f"a bond dimension must be an integer of at least 1, not {list(self.bonds)}.")
        if math.prod(self.rows) * math.prod(self.columns) > _LARGEST_SIZE:
            raise FiftyfoldError(f"factors {self.rows} and {self.columns} make no matrix that a computer holds.")
        if self.bonds != clipped_bonds(self.rows, self.columns, self.bonds):
            raise FiftyfoldError(f"bonds {self.bonds} are more than factors {self.rows} and {self.columns} can use.")

    @property
    def core_shapes(self) -> list[CoreShape]:
        """The shapes of the cores, first site first."""
        edges = (1, *self.bonds, 1)
        return list(zip(edges[:-1], self.rows, self.columns, edges[1:], strict=True))

    @property
    def is_low_rank(self) -> bool:
        """Whether this is a product of two thin matrices."""
        return len(self.rows) == 2 and self.columns[0] == 1 and self.rows[1] == 1

    def count(self, gauge: Gauge = "free") -> int:
        """Return how many numbers the cores hold."""
        saved = sum(bond**2 for bond in self.bonds) if gauge == "fixed" else 0
        return sum(math.prod(shape) for shape in self.core_shapes) - saved


@dataclass(frozen=True)
class NetworkForm:
    """What stands in the place of one matrix.

    Attributes:
        shape: outputs (or rows of an embedding) and inputs (or width) of the matrix.
        terms: matrix product operators, whose sum it is.
        gauge: how the numbers are kept.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    gauge: Gauge = "free"

    def __post_init__(self) -> None:
        if not self.terms or self.gauge not in get_args(Gauge):
            raise FiftyfoldError("a tensor network needs a term, and a gauge that is 'free' or 'fixed'.")
        if len(self.shape) != 2 or any(type(size) is not int or size < 1 for size in self.shape):
            raise FiftyfoldError(f"a tensor network stands for a matrix, not for the shape {self.shape}.")
        for term in self.terms:
            if math.prod(term.rows) < self.shape[0] or math.prod(term.columns) < self.shape[1]:
                raise FiftyfoldError(f"factors {term.rows} and {term.columns} are too few for {self.shape}.")

    @property
    def count(self) -> int:
        """How many numbers are kept."""
        return sum(term.count(self.gauge) for term in self.terms)

    @property
    def matrix_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that the numbers are kept as, in their order.

        All cores but the last of a term are unfolded to (left bond · outputs · inputs, right bond), without the rows
        of the identity block if the gauge is fixed; the last is (left bond, outputs · inputs).
        """
        shapes = []
        for term in self.terms:
            *others, (left, rows, columns, _) = term.core_shapes
            for first, row, column, right in others:
                shapes.append((first * row * column - (right if self.gauge == "fixed" else 0), right))
            shapes.append((left, rows * columns))
        return shapes

    @property
    def pivots(self) -> int:
        """How many row numbers of identity blocks are kept."""
        return sum(sum(term.bonds) for term in self.terms) if self.gauge == "fixed" else 0

    @property
    def pivot_bytes(self) -> int:
        """Bytes that each of them takes in a file: 2, or 4 where a core has many rows."""
        longest = max(left * row * column for term in self.terms for left, row, column, _ in term.core_shapes)
        return 2 if longest <= 2**15 else 4

    @property
    def pivot_bits(self) -> int:
        """Binary digits that tell apart the rows of any core that has an identity block."""
        unfolded = [left * row * column for term in self.terms for left, row, column, _ in term.core_shapes[:-1]]
        return (max(unfolded, default=1) - 1).bit_length()

    def stored_bytes(self, bits: int = 16) -> int:
        """Return what a file holds for the matrix: numbers, pivots, and 16-bit scales by row for fewer bits than 16."""
        scales = 0 if bits >= 16 else sum(rows for rows, columns in self.matrix_shapes if rows and columns)
        return math.ceil(self.count * bits / 8) + self.pivots * self.pivot_bytes + 2 * scales

    def with_gauge(self, gauge: Gauge) -> NetworkForm:
        """Return the same network with its numbers kept in another way."""
        return NetworkForm(self.shape, self.terms, gauge)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {key: _lists(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: object) -> NetworkForm:
        """Read what :meth:`to_json` wrote, perhaps altered since.

        Raises:
            FiftyfoldError: if anything is missing, unknown or impossible.
        """
        if not isinstance(values, Mapping) or set(values) != {"shape", "terms", "gauge"}:
            raise FiftyfoldError("the form of a tensor network must have exactly shape, terms and gauge.")
        terms, shape = values["terms"], values["shape"]
        if not isinstance(terms, list) or not isinstance(shape, list):
            raise FiftyfoldError("the shape and the terms of a tensor network must be lists.")
        return cls(tuple(shape), tuple(_read_term(term) for term in terms), values["gauge"])


def balanced_form(shape: tuple[int, int], cores: int, bond_dimension: int) -> NetworkForm:
    """Return a chain of ``cores`` cores with even factors on both sides, its bonds clipped to what they can use.

    Args:
        shape: outputs and inputs.
        cores: at least 2.
        bond_dimension: at least 1.
    """
    rows, columns = (site_factors(size, cores) for size in shape)
    bonds = clipped_bonds(rows, columns, [bond_dimension] * (cores - 1))
    return NetworkForm(shape, (Term(rows, columns, bonds),))


def low_rank_form(shape: tuple[int, int], rank: int) -> NetworkForm:
    """Return a product of two thin matrices, its rank clipped to what the shape allows.

    Args:
        shape: outputs and inputs.
        rank: at least 1.
    """
    return NetworkForm(shape, (low_rank_term(shape, rank),))


def low_rank_term(shape: tuple[int, int], rank: int) -> Term:
    """Return the term of :func:`low_rank_form`."""
    return Term((shape[0], 1), (1, shape[1]), (min(rank, *shape),))


def clipped_bonds(rows: Sequence[int], columns: Sequence[int], bonds: Sequence[int]) -> tuple[int, ...]:
    """Return ``bonds``, each no larger than the cores on either side of it can use."""
    sites = [row * column for row, column in zip(rows, columns, strict=True)]
    clipped = list(bonds)
    for index in range(len(clipped)):
        clipped[index] = min(clipped[index], (clipped[index - 1] if index else 1) * sites[index])
    for index in reversed(range(len(clipped))):
        beyond = clipped[index + 1] if index + 1 < len(clipped) else 1
        clipped[index] = min(clipped[index], beyond * sites[index + 1])
    return tuple(clipped)


def _lists(value: Any) -> Any:
    """Turn tuples into lists at every depth, as JSON would."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return [_lists(each) for each in value] if isinstance(value, tuple | list) else value


def _read_term(values: object) -> Term:
    if not isinstance(values, Mapping) or set(values) != {"rows", "columns", "bonds"}:
        raise FiftyfoldError("a term of a tensor network must have exactly rows, columns and bonds.")
    if not all(isinstance(each, list) for each in values.values()):
        raise FiftyfoldError("rows, columns and bonds of a tensor network must be lists.")
    sizes = list(itertools.chain.from_iterable(values.values()))
    if not all(type(size) is int for size in sizes):
        raise FiftyfoldError("rows, columns and bonds of a tensor network must be integers.")
    return Term(*(tuple(values[key]) for key in ("rows", "columns", "bonds")))
