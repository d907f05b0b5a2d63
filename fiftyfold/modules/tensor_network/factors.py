"""Cutting a dimension into factors, one for each core of a matrix product operator."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

LARGEST_IMBALANCE = 4
"""Where the largest factor is more than so many times the smallest, the dimension is padded with zeros instead."""

SKEWS = (-0.25, 0.25)
"""How far from even the cuts go that are tried; see :func:`skewed_sites`."""

Sites = tuple[tuple[int, ...], tuple[int, ...]]
"""The factors of the outputs and of the inputs, one of each for each core."""

_LARGEST_PADDING = 0.05


def even_factors(size: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` most even factors whose product is ``size`` exactly, rising.

    216 in three gives (6, 6, 6), 768 gives (8, 8, 12), 11008 gives (16, 16, 43), and 50257 in two gives (29, 1733).

    Args:
        size: at least 1.
        count: at least 1.
    """
    return min(_factorizations(size, count, 1), key=lambda factors: (sum(factors), factors))


@functools.cache
def site_factors(size: int, count: int) -> tuple[int, ...]:
    """Return ``count`` even factors whose product is ``size`` or, where that has no even ones, a little more.

    A prime, or a number such as 50257 = 29 · 1733, would put nearly all of the matrix into one core. Then zeros fill
    the dimension up to the next number that has even factors, by at most a twentieth (or by one).

    Args:
        size: at least 1.
        count: at least 1.
    """
    exact = even_factors(size, count)
    if _imbalance(exact) <= LARGEST_IMBALANCE:
        return exact
    for padded in range(size + 1, size + max(1, int(size * _LARGEST_PADDING)) + 1):
        factors = even_factors(padded, count)
        if _imbalance(factors) <= LARGEST_IMBALANCE / 2:
            return factors
    return exact


def even_sites(shape: tuple[int, int], count: int) -> Sites:
    """Return :func:`site_factors` of both sides of a matrix."""
    rows, columns = shape
    return site_factors(rows, count), site_factors(columns, count)


def skewed_sites(shape: tuple[int, int], count: int) -> list[Sites]:
    """Return ways to cut a matrix between the even one and low rank's, in which each core has rows or columns alone.

    Skewed by s, the first of n cores takes the rows to the power (1 + s) / n and the columns to the power (1 - s) / n,
    as nearly as divisors allow, the last the reverse, and those between what lies between; s = 0 is even, and s = 1 for
    two cores is low rank.

    Args:
        shape: outputs and inputs, both padded as :func:`site_factors` pads them.
        count: of cores, at least 2.
    """
    even = even_sites(shape, count)
    found: list[Sites] = []
    for skew in SKEWS:
        slopes = [skew * (1 - 2 * site / (count - 1)) for site in range(count)]
        rows = _nearest_factors(math.prod(even[0]), [(1 + slope) / count for slope in slopes])
        columns = _nearest_factors(math.prod(even[1]), [(1 - slope) / count for slope in slopes])
        # At either end another family has it.
        if all(min(row, column) > 1 for row, column in zip(rows, columns, strict=True)):
            found.append((rows, columns))
    return [sites for sites in dict.fromkeys(found) if sites != even]


def _nearest_factors(size: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return factors whose logarithms have nearly these shares in the size's."""
    whole = math.log(size)
    orders = {order for rising in _factorizations(size, len(shares), 1) for order in itertools.permutations(rising)}

    def distance(factors: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        apart = (abs(math.log(factor) - share * whole) for factor, share in zip(factors, shares, strict=True))
        return max(apart), factors

    return min(orders, key=distance)


def _imbalance(factors: tuple[int, ...]) -> float:
    return factors[-1] / factors[0]


def _factorizations(size: int, count: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """Yield the rising factorizations whose first factor is at least ``smallest``."""
    if count == 1:
        yield (size,)
        return
    first = smallest
    # The first of rising factors is at most the count-th root of the size.
    while first**count <= size:
        if size % first == 0:
            for others in _factorizations(size // first, count - 1, first):
                yield (first, *others)
        first += 1
