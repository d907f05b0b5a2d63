"""Where fiftyfold keeps what it can make again: compiled kernels and tokenised data."""

from __future__ import annotations

import os
from pathlib import Path

from fiftyfold.errors import FiftyfoldError


def user_cache_folder() -> Path:
    """Return ``fiftyfold`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``; it need not exist.

    Raises:
        FiftyfoldError: if the user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fiftyfold"
    except RuntimeError as error:
        raise FiftyfoldError("there is no home folder to keep a cache in; set XDG_CACHE_HOME to a folder.") from error
