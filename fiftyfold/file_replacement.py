"""Putting a file in the place of another: whole or not at all, whatever stops the process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside ``path`` that takes its place when the block ends well, and else disappears.

    A kill leaves ``path`` as it was; so does a power cut, because the disk holds the content before the name points to
    it. What a kill leaves beside it, the next replacement of the same file removes; two processes must not replace one
    file at the same time.

    Args:
        path: the file; its folder exists.

    Raises:
        OSError: if the disk refuses.
    """
    for left_over in path.parent.glob(f".{escaped(path.name)}.*.tmp"):
        left_over.unlink(missing_ok=True)
    with _beside(path, os.replace) as file:
        yield file


@contextmanager
def created_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside ``path`` that gets this name when the block ends well, and else disappears.

    Of several processes that create one file, the first to end has it.

    Args:
        path: the file; its folder exists.

    Raises:
        FileExistsError: if there is such a file by then; it stays as it is.
        OSError: if the disk refuses.
    """
    with _beside(path, os.link) as file:
        yield file


@contextmanager
def _beside(path: Path, give_name: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        give_name(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def escaped(name: str) -> str:
    """Return a pattern for :meth:`pathlib.Path.glob` that matches ``name`` and nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
