"""Keeping two runs from writing the same files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fiftyfold.errors import FiftyfoldError


@contextmanager
def sole_writer(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on a file inside the block.

    The lock ends with the process, however that ends, so that none is ever left behind.

    Args:
        path: the file; made, empty, if it is missing.
        what: how the message calls what the two runs would both write.

    Raises:
        FiftyfoldError: if another process holds the lock.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ends may delete its folder before our opening, or between that and our lock.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise FileNotFoundError(path)
        except (BlockingIOError, FileNotFoundError) as error:
            raise FiftyfoldError(
                f"another run is writing {what} just now; wait for its end, or name another output."
            ) from error
        yield
