"""Spreading a budget of bytes over matrices: a multiple-choice knapsack, solved by its Lagrangian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fiftyfold.errors import FiftyfoldError

_HALVINGS = 60


@dataclass(frozen=True)
class Option:
    """One way to store one matrix.

    Attributes:
        bytes: that it takes.
        cost: what it does to the model, in any unit that all matrices share.
    """

    bytes: float
    cost: float


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """Choose one option for each matrix, so that the costs' sum is small and the bytes keep to the budget.

    A price for a byte is found by bisection, at which every matrix takes the option that is cheapest for it; what is
    left of the budget then buys the best single improvements.

    Args:
        options: for each matrix, at least one.
        budget: bytes for all of them.

    Returns:
        For each matrix, the index of its option.

    Raises:
        FiftyfoldError: if not even the smallest options fit.
    """
    least = sum(min(option.bytes for option in each) for each in options)
    if least > budget:
        raise FiftyfoldError(
            f"a budget of {budget:.0f} bytes cannot be met: the smallest forms take {least:.0f}; raise keep."
        )
    low, high = 0.0, 1.0
    while _bytes(options, _cheapest(options, high)) > budget:
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _bytes(options, _cheapest(options, middle)) <= budget else (middle, high)
    return _improved(options, _cheapest(options, high), budget)


def _cheapest(options: Sequence[Sequence[Option]], price: float) -> list[int]:
    return [
        min(range(len(each)), key=lambda index, each=each: (each[index].cost + price * each[index].bytes, index))  # type: ignore[misc]
        for each in options
    ]


def _bytes(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(each[index].bytes for each, index in zip(options, chosen, strict=True))


def _improved(options: Sequence[Sequence[Option]], chosen: list[int], budget: float) -> list[int]:
    left = budget - _bytes(options, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for place, (each, now) in enumerate(zip(options, chosen, strict=True)):
            for index, option in enumerate(each):
                more, gain = option.bytes - each[now].bytes, each[now].cost - option.cost
                if gain > 0 and more <= left and (best is None or gain / max(more, 1e-9) > best[0]):
                    best = (gain / max(more, 1e-9), place, index)
        if best is None:
            return chosen
        _, place, index = best
        left -= options[place][index].bytes - options[place][chosen[place]].bytes
        chosen[place] = index
