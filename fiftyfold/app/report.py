"""``fiftyfold report``: the table of a compressed folder once more."""

from __future__ import annotations

import json
from pathlib import Path

from fiftyfold.app.road import PICTURE_FILE, show
from fiftyfold.app.summary import Row, draw_picture
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.export import REPORT_FILE


def report(folder: str) -> None:
    """Print the table of a compressed folder and draw its picture again.

    Args:
        folder: a folder that `fiftyfold compress`, `fiftyfold tensorize` or `fiftyfold quickstart` wrote.
    """
    rows, metric = read_rows(Path(folder))
    draw_picture(rows, metric=metric, title=Path(folder).name, path=Path(folder) / PICTURE_FILE)
    show(rows, metric, Path(folder))


def read_rows(folder: Path) -> tuple[list[Row], str]:
    """Return the rows of a compressed folder's table, and the name of their metric.

    Raises:
        FiftyfoldError: if the folder has no report, or if that holds no table.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise FiftyfoldError(
            f"{folder} has no {REPORT_FILE}; give a folder that fiftyfold compress or tensorize wrote."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Row(**row) for row in content["rows"]], str(content["metric"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FiftyfoldError(f"{path} holds no table; export alone measures no score.") from error
