"""Putting a folder in the place of another: whole or not at all, and found again where a kill came in between."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_replacement import escaped, sync

_OLD = ".old"


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the block ends well, and else disappears.

    A folder cannot be renamed over one that holds something, so the old one steps aside first. A kill between the two
    renames leaves both beside ``target``, for :func:`complete_replacement`.

    Raises:
        FiftyfoldError: if the disk refuses.
    """
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        _open_to_all(aside)
        for path in [*aside.iterdir(), aside]:
            sync(path)
        _put_in_place(aside, target)
        sync(target.parent)
    except OSError as error:
        raise FiftyfoldError(f"{target} cannot be written ({error}); nothing was exported.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def interrupted_replacement(target: Path) -> tuple[Path, Path] | None:
    """Return the new and the old folder of a replacement that a kill stopped between its renames, if there was one."""
    if target.exists():
        return None
    for old in sorted(target.parent.glob(f".{escaped(target.name)}.*{_OLD}")):
        new = old.with_name(old.name.removesuffix(_OLD))
        if old.is_dir() and new.is_dir():
            return new, old
    return None


def complete_replacement(target: Path) -> bool:
    """Do what a kill left undone: the new folder, which was complete, comes into its place, and the old one goes.

    Returns:
        Whether there was something to do.

    Raises:
        FiftyfoldError: if the disk refuses.
    """
    found = interrupted_replacement(target)
    if found is None:
        return False
    new, old = found
    try:
        new.rename(target)
        sync(target.parent)
    except OSError as error:
        raise FiftyfoldError(
            f"an export to {target} was interrupted and cannot be completed ({error}); rename {new} or {old} to it."
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return True


def _open_to_all(folder: Path) -> None:
    """Let whoever may read the folder read its files: safetensors makes files for their owner alone."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def _put_in_place(aside: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        aside.rename(target)
        return
    old = aside.with_name(f"{aside.name}{_OLD}")
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
