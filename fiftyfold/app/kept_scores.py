"""Scores in a file, so that a run that was killed need not measure again what it knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fiftyfold.file_replacement import replaced_file
from fiftyfold.modules.digest import digest_of
from fiftyfold.modules.journal import number

Scores = dict[str, float]


def kept_score(path: Path, measured: Any, find: Callable[[], Scores]) -> Scores:
    """Return what was measured before, or measure it now and keep it.

    Args:
        path: a JSON file; its folder exists. One that cannot be read is written anew.
        measured: what decides the score: nested JSON values and tensors.
        find: measures it.
    """
    key, known = digest_of(measured), _read(path)
    if key not in known:
        known[key] = find()
        with replaced_file(path) as file:
            file.write(json.dumps(known).encode())
    return known[key]


def _read(path: Path) -> dict[str, Scores]:
    try:
        content = json.loads(path.read_bytes())
        found = {key: {name: number(value) for name, value in scores.items()} for key, scores in content.items()}
        return {key: scores for key, scores in found.items() if scores}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
