"""``fiftyfold report``: the table of a compressed folder once more."""

from __future__ import annotations

from pathlib import Path

from fiftyfold.app.delivered import read_rows
from fiftyfold.app.road import PICTURE_FILE, show
from fiftyfold.app.summary import draw_picture


def report(folder: str) -> None:
    """Print the table of a compressed folder and draw its picture again.

    Args:
        folder: a folder that `fiftyfold compress`, `fiftyfold tensorize` or `fiftyfold quickstart` wrote.
    """
    rows, metric = read_rows(Path(folder))
    draw_picture(rows, metric=metric, title=Path(folder).name, path=Path(folder) / PICTURE_FILE)
    show(rows, metric, Path(folder))
