"""What a delivered folder tells of the run that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fiftyfold.app.summary import Row
from fiftyfold.app.training import CONTENT, OPTIONS_FILE, chosen_options, remove_work_folder
from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
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


def complete_delivery(folder: Path, work: Path, options: dict[str, Any]) -> bool:
    """Remove the work folder of a run that was killed when its folder had its name already.

    Args:
        folder: what the run makes.
        work: its work folder.
        options: what it was asked for, as JSON values.

    Returns:
        Whether there was such a run.

    Raises:
        FiftyfoldError: if it goes on just now.
    """
    asked, stamp = chosen_options(json.dumps(options)), work / OPTIONS_FILE
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        is_ours = chosen_options(json.dumps(report["run"]["recipe"])) == asked and {"rows", "metric", "scores"} <= set(
            report
        )
        if not is_ours or not work.is_dir():
            return False
        if any(work.iterdir()):
            known = chosen_options(stamp.read_text(encoding="utf-8"))
            known.pop(CONTENT, None)
            if known != asked:
                return False
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    with sole_writer(stamp, str(work)):
        remove_work_folder(work)
    return True
