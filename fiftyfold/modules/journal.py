"""What a long search has found so far, kept in a folder, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
from fiftyfold.file_replacement import replaced_file
from fiftyfold.modules.surgery import plain_name

LINES_FILE = "journal.jsonl"
"""One line for each thing that was found, below one that says what was searched."""

_Value = TypeVar("_Value")


class Journal:
    """Values by key, each on the disk as soon as it is known; without a folder, nothing is kept.

    :func:`open_journal` makes one.

    Args:
        folder: where it is kept.
        stamp: digest of all that decides what is found.
    """

    def __init__(self, folder: Path | None = None, stamp: str = "") -> None:
        self._folder, self._stamp = folder, stamp
        self._lines: dict[str, Any] = {}
        if folder is not None:
            self._lines = _read_lines(folder / LINES_FILE, stamp)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

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
        """Keep what was found: plain JSON values, and perhaps tensors."""
        if self._folder is None:
            return
        line: dict[str, Any] = {"key": key, "value": value}
        if tensors is not None:
            own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            file = f"{len(self._lines):05}.safetensors"
            with replaced_file(self._folder / file) as stream:
                stream.write(save(own))
            line |= {"file": file, "digest": digest_of(own)}
        # Not before: what fails without a finding leaves the folder for another search.
        first = [] if self._lines else [{"stamp": self._stamp}]
        with (self._folder / LINES_FILE).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in (*first, line))
            stream.flush()
            os.fsync(stream.fileno())
        self._lines[key] = line

    def remember(self, key: str, find: Callable[[], Any], read: Callable[[Any], _Value]) -> _Value:
        """Return what was found for a key, or find it now and keep it.

        Args:
            key: of the value.
            find: returns it as JSON.
            read: makes the value of its JSON.

        Raises:
            FiftyfoldError: if the file is damaged.
        """
        if key in self:
            return self.read(key, read)
        found = find()
        self.add(key, found)
        return read(found)

    def _damaged(self, key: str, why: object) -> FiftyfoldError:
        assert self._folder is not None
        return FiftyfoldError(
            f"{self._folder / LINES_FILE} is damaged (at {key}: {why}); delete {self._folder} to begin anew."
        )


@contextmanager
def open_journal(folder: Path | None, searched: Any, what: str) -> Iterator[Journal]:
    """Yield the journal of a search that goes on in a folder, or begins there; no other process may, meanwhile.

    Args:
        folder: made if it is missing, and gone again if nothing was found in it; none to keep nothing.
        searched: what decides all that is found: nested JSON values and tensors.
        what: how a message calls the search: "a profile".

    Raises:
        FiftyfoldError: if the folder holds another search, one that goes on just now, or a damaged one.
    """
    if folder is None:
        yield Journal()
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LINES_FILE
    with sole_writer(path, str(folder)):
        try:
            try:
                journal = Journal(folder, digest_of(searched))
            except _OtherSearchError as error:
                raise FiftyfoldError(
                    f"{folder} holds {what} of another model or text, or with other options; name another folder, or "
                    "delete that one."
                ) from error
            yield journal
        finally:
            if not path.stat().st_size:
                path.unlink()
                if not any(folder.iterdir()):
                    folder.rmdir()


def digest_of(value: Any) -> str:
    """Return a digest over nested mappings in any order, sequences, plain values and typed tensors."""
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all that a model computes with, by plain names; not what its state dict tells besides, such as a log."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {plain_name(name): tensor for name, tensor in named}


def number(value: Any) -> float:
    """Return a JSON value that is a finite number.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


class _OtherSearchError(Exception):
    """The stamp is another one."""


def _read_lines(path: Path, stamp: str) -> dict[str, Any]:
    """Return the lines by key; one that a kill left unfinished is cut off."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()] or [{"stamp": stamp}]
        found = {line["key"]: line for line in lines}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise FiftyfoldError(f"{path} is damaged ({error}); delete {path.parent} to begin anew.") from error
    if first != {"stamp": stamp}:
        raise _OtherSearchError
    os.truncate(path, len(whole) if found else 0)
    return found


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for name, each in sorted(value.items(), key=lambda item: repr(item[0])):
            yield f"{name!r} ".encode()
            yield from _parts(each)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)} ".encode()
        for each in value:
            yield from _parts(each)
    else:
        yield f"{value!r} ".encode()
