"""What a long search has found so far, kept in a folder, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
from fiftyfold.file_replacement import replaced_file
from fiftyfold.modules.digest import digest_of

LINES_FILE = "journal.jsonl"
"""One line for each thing that was found, below one that says what was searched."""

_LOCK_FILE = "journal.lock"
_FORMAT = 1

_Value = TypeVar("_Value")


class Journal:
    """Values by key, each on the disk as soon as it is known; without a folder, nothing is kept.

    :func:`open_journal` makes one.

    Args:
        folder: where it is kept.
        stamp: digest of all that decides what is found.

    Raises:
        FiftyfoldError: if what is there is damaged.
    """

    def __init__(self, folder: Path | None = None, stamp: str = "") -> None:
        self._folder, self._stamp = folder, stamp
        self._lines: dict[str, Any] = {}
        if folder is not None and (folder / LINES_FILE).exists():
            self._lines = _read_lines(folder / LINES_FILE, stamp)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    @property
    def keys(self) -> list[str]:
        """Of all that was found, in its order."""
        return list(self._lines)

    def read(self, key: str, read: Callable[[Any], _Value]) -> _Value:
        """Return what was found for a key.

        Args:
            key: what was added before.
            read: makes the value of its JSON; its errors tell that the file is damaged.

        Raises:
            FiftyfoldError: if it is.
        """
        try:
            return read(self._lines[key]["value"])
        except (FiftyfoldError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(key, error) from error

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """Return the tensors that were added with a value, on the CPU.

        Raises:
            FiftyfoldError: if their file is missing or damaged.
        """
        assert self._folder is not None
        try:
            file, expected = str(self._lines[key]["file"]), self._lines[key]["digest"]
            found = load_file(self._folder / Path(file).name)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise self._damaged(key, error) from error
        if digest_of(found) != expected:
            raise self._damaged(key, "its tensors have changed")
        return found

    def add(self, key: str, value: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep what was found: plain JSON values, and perhaps tensors.

        Raises:
            FiftyfoldError: if the disk refuses.
        """
        if self._folder is None:
            return
        try:
            self._lines[key] = self._written(self._folder, key, value, tensors)
        except OSError as error:
            raise FiftyfoldError(
                f"{self._folder} cannot be written ({error}); what is in it stays, and the same call goes on there."
            ) from error

    def remember(self, key: str, find: Callable[[], Any], read: Callable[[Any], _Value]) -> _Value:
        """Return what was found for a key, or find it now and keep it.

        Args:
            key: of the value.
            find: returns it as JSON.
            read: makes the value of its JSON.

        Raises:
            FiftyfoldError: if what is found is no value, the file is damaged, or the disk refuses.
        """
        if key in self:
            return self.read(key, read)
        found = find()
        try:
            value = read(found)
        except ValueError as error:
            raise FiftyfoldError(f"{key}: {error}.") from error
        self.add(key, found)
        return value

    def _written(
        self, folder: Path, key: str, value: Any, tensors: Mapping[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        path, line = folder / LINES_FILE, {"key": key, "value": value}
        if not path.exists():
            # Before anything else: a folder with other files and no stamp is not ours.
            with replaced_file(path) as stream:
                stream.write(_line({"stamp": self._stamp}))
        if tensors is not None:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            file = f"{len(self._lines):05}.safetensors"
            with replaced_file(folder / file) as stream:
                stream.write(save(own))
            line |= {"file": file, "digest": digest_of(own)}
        with path.open("ab") as lines:
            lines.write(_line(line))
            lines.flush()
            os.fsync(lines.fileno())
        return line

    def _damaged(self, key: str, why: object) -> FiftyfoldError:
        assert self._folder is not None
        return FiftyfoldError(
            f"{self._folder / LINES_FILE} is damaged (at {key}: {why}); delete {self._folder} to begin anew."
        )


@contextmanager
def open_journal(folder: str | Path | None, searched: Callable[[], Any]) -> Iterator[Journal]:
    """Yield the journal of a search that goes on in a folder, or begins there; no other process may, meanwhile.

    Args:
        folder: made if it is missing, and gone again if nothing was found in it; none to keep nothing.
        searched: returns what decides all that is found: nested plain values and tensors.

    Raises:
        FiftyfoldError: if the folder holds another search, one that goes on just now, a damaged one or something else,
            or cannot be made.
    """
    if folder is None:
        yield Journal()
        return
    if not isinstance(folder, str | Path):
        raise FiftyfoldError(f"a work folder is a path, not {folder!r}.")
    stamp = digest_of([_FORMAT, searched()])
    with ExitStack() as stack:
        try:
            place = Path(folder).expanduser()
            _claim(place, stack, is_new=not place.exists())
            journal = Journal(place, stamp)
        except _OtherSearchError as error:
            raise FiftyfoldError(
                f"{folder} holds work on another model or text, or with other options; name another folder, or delete "
                "that one."
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise FiftyfoldError(f"{folder} cannot be a work folder ({error}); name another one.") from error
        yield journal


def number(value: Any) -> float:
    """Return a JSON value that is a finite number.

    Raises:
        ValueError: if it is not.
    """
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{str(value)[:80]} is no number")
    return found


class _OtherSearchError(Exception):
    """The stamp is another one."""


def _claim(place: Path, stack: ExitStack, *, is_new: bool) -> None:
    """Hold a folder that is empty or has a journal, until the stack ends; a new one that stays empty goes then."""
    place.mkdir(parents=True, exist_ok=True)
    lock = place / _LOCK_FILE

    def leave() -> None:
        with suppress(OSError):
            lock.unlink(missing_ok=True)
            if is_new:
                place.rmdir()

    if not (place / LINES_FILE).exists() and not all(map(_is_ours, place.iterdir())):
        raise FiftyfoldError(f"{place} holds something else; name another folder.")
    stack.enter_context(sole_writer(lock, str(place)))
    stack.callback(leave)


def _is_ours(path: Path) -> bool:
    """Tell whether a kill left a file before there was a journal: a lock, or the journal in the making."""
    if path.name == _LOCK_FILE:
        return path.stat().st_size == 0
    return re.fullmatch(rf"\.{re.escape(LINES_FILE)}\.[0-9a-f]{{12}}\.tmp", path.name) is not None


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _read_lines(path: Path, stamp: str) -> dict[str, Any]:
    """Return the lines by key; one that a kill left unfinished is cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = {line["key"]: line for line in lines}
        is_ours = isinstance(first, dict) and set(first) == {"stamp"}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FiftyfoldError(f"{path} is damaged ({error}), or none of ours; name another folder.") from error
    if not is_ours:
        raise FiftyfoldError(f"{path} is none of ours; name another folder.")
    if first["stamp"] != stamp:
        raise _OtherSearchError
    os.truncate(path, len(whole))
    return found
