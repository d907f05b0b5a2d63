"""Cutting a dimension into factors, one for each core of a matrix product operator."""

from __future__ import annotations

from collections.abc import Iterator

LARGEST_IMBALANCE = 4
"""Where the largest factor is more than so many times the smallest, the dimension is padded with zeros instead."""

_LARGEST_PADDING = 0.05


def even_factors(size: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` most even factors whose product is ``size`` exactly, rising.

    216 in three gives (6, 6, 6), 768 gives (8, 8, 12), 11008 gives (16, 16, 43), and 50257 in two gives (29, 1733).

    Args:
        size: at least 1.
        count: at least 1.
    """
    return min(_factorizations(size, count, 1), key=lambda factors: (sum(factors), factors))


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
