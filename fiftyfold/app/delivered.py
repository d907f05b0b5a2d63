"""What a delivered folder tells of the run that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fiftyfold.app.summary import Row
from fiftyfold.app.training import OPTIONS_FILE
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.export import REPORT_FILE


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


def is_delivered(folder: Path, work: Path, options: dict[str, Any]) -> bool:
    """Tell whether a run was killed when its folder had its name already, and only its work folder was left to remove.

    Args:
        folder: what the run makes.
        work: its work folder.
        options: what it was asked for, as JSON values.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        return (work / OPTIONS_FILE).is_file() and report["run"]["recipe"] == json.loads(json.dumps(options))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
