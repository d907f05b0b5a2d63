"""How long work on a model's matrices tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], object]
"""Is called as long work goes on: with what is done to the matrices, for how many it is done, and of how many."""


def silent(_: str, __: int, ___: int) -> None:
    """Report nothing."""


def ends_a_tenth(done: int, total: int) -> bool:
    """Tell whether the last that was done completes another tenth of all, which is worth a line."""
    return done * 10 // total > (done - 1) * 10 // total
