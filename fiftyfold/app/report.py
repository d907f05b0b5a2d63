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
        folder: a folder that `fiftyfold compress` or `fiftyfold quickstart` wrote.
    """
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        raise FiftyfoldError(f"{folder} has no {REPORT_FILE}; give a folder that fiftyfold compress wrote.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, metric = [Row(**row) for row in content["rows"]], str(content["metric"])
    except (ValueError, KeyError, TypeError) as error:
        raise FiftyfoldError(f"{path} holds no table; export alone measures no score.") from error
    draw_picture(rows, metric=metric, title=path.parent.name, path=path.parent / PICTURE_FILE)
    show(rows, metric, path.parent)
