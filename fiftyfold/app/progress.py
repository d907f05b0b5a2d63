"""A bar for each kind of long work; lines where nobody would see a bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from fiftyfold.modules.tensor_network.progress import Report, ends_a_tenth


@contextmanager
def shown(subject: str) -> Iterator[Report]:
    """Show how far long work is.

    Args:
        subject: what the work is done to: ``Matrices``.

    Yields:
        What is to be told of each that is done.
    """
    if not Console().is_terminal:
        # Standard output is a command's table.
        yield lambda what, done, total: _print_tenths(f"{subject} {what}", done, total)
        return
    with Progress(transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{subject} {what}", total=total)
            progress.update(tasks[what], completed=done)

        yield report


def _print_tenths(what: str, done: int, total: int) -> None:
    if ends_a_tenth(done, total):
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
