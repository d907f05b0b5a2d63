"""Reading checkpoints: whole ones, compressed ones without a Trainer, and what structure one has."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.structure import STATE_KEY, Operation, decode_log, replaying

SHARDED_LOGS_KEY = "fiftyfold_structure"
"""Where a checkpoint of a sharded module holds the logs, by part, beside the state dict."""

_METADATA_FILE = "meta.pt"
"""What Lightning puts beside the shards of a checkpoint: all but the tensors of model and optimizers."""

_Module = TypeVar("_Module", bound=LightningModule)


def load_from_checkpoint(module_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Load a checkpoint of any LightningModule into the structure that it was saved with.

    ``module_class.load_from_checkpoint(path)`` alone involves no callback: it fails on the first missing or unexpected
    key, or, with ``strict=False``, silently leaves weights at their random values.

    Args:
        module_class: the class that was trained; it need know nothing of fiftyfold.
        path: the checkpoint file.
        **kwargs: handed to ``module_class.load_from_checkpoint``.

    Returns:
        The module, compressed as it was when the checkpoint was saved.

    Raises:
        FiftyfoldError: if the file is damaged, or if its structure log does not fit the module.
    """
    check_checkpoint(Path(path))
    with replaying():
        return module_class.load_from_checkpoint(path, **kwargs)  # type: ignore[no-any-return]


def checkpoint_structure(path: str | Path) -> dict[str, list[Operation]]:
    """Read the structure logs in a checkpoint, by the part of the module that carries each.

    Args:
        path: a checkpoint file, or the folder that a sharding strategy writes.

    Returns:
        One log for each compressed part; empty for a checkpoint of a module that nothing compressed.

    Raises:
        FiftyfoldError: if the checkpoint cannot be read, or a log in it is corrupt.
    """
    path = Path(path)
    try:
        file = path / _METADATA_FILE if path.is_dir() else path
        # Mapped, so that only the logs are read and not the weights.
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if path.is_dir():
            written = dict(checkpoint.get(SHARDED_LOGS_KEY, {}))
        else:
            state = checkpoint["state_dict"]
            keys = [key for key in state if key.rpartition(".")[2] == STATE_KEY]
            written = {key.removesuffix(STATE_KEY).rstrip("."): state[key] for key in keys}
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.PickleError,
    ) as error:
        raise FiftyfoldError(f"the structure of the checkpoint {path} cannot be read ({error}).") from error
    return {part: decode_log(log) for part, log in written.items()}


def check_checkpoint(path: Path) -> None:
    """Compare the contents of a checkpoint with the checksums in it, which ``torch.load`` does not look at.

    Args:
        path: a file that ``torch.save`` wrote. One in torch's format of before 1.6 has no checksums and is let through,
            and so is a path where no file is.

    Raises:
        FiftyfoldError: if a part of the file was altered since it was written.
    """
    if not path.is_file():
        return
    try:
        if not zipfile.is_zipfile(path):
            if _begins_as_archive(path):
                raise zipfile.BadZipFile("its end is missing")
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        raise FiftyfoldError(f"{path} is damaged ({error}); go on from another checkpoint.") from error
    if damaged is not None:
        raise FiftyfoldError(f"{path} is damaged: its checksum of {damaged!r} does not fit; use another checkpoint.")


def _begins_as_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"", b"PK\x03\x04")
