"""The safetensors files of an exported folder: written with a checksum, read with suspicion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fiftyfold.errors import FiftyfoldError

DIGEST_KEY = "fiftyfold_sha256"
"""Name of the checksum among a file's metadata."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: the format's own name of it, such as ``"U8"``.
        shape: sizes, outermost first.
    """

    dtype: str
    shape: tuple[int, ...]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` and their checksum to ``path``.

    Raises:
        OSError: if the disk refuses, for instance because it is full.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt", DIGEST_KEY: digest(contiguous)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, in place: safetensors writes it in any, and equal models are to give equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 over the types, shapes and bytes of ``tensors``.

    Names do not count and order does not matter, so that it survives the renaming and the splitting into several
    files that transformers may do when it saves a loaded model again.
    """
    return _combine(_tensor_digest(tensor) for tensor in tensors.values())


def read_headers(paths: Sequence[Path]) -> dict[str, TensorHeader]:
    """Read what the files say they hold, without their contents.

    Raises:
        FiftyfoldError: if a file is absent, truncated, or is no safetensors file, or if two hold the same name.
    """
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in headers:
                    raise FiftyfoldError(f"{name!r} is in two weight files beside {path}; export the model again.")
                part = file.get_slice(name)
                headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
    return headers


def check_digest(paths: Sequence[Path]) -> None:
    """Compare the contents of the files with the checksum in them.

    Raises:
        FiftyfoldError: if they differ, or if a file has no checksum.
    """
    digests: list[bytes] = []
    for path in paths:
        with _opened(path) as file:
            stated = (file.metadata() or {}).get(DIGEST_KEY)
            digests.extend(_tensor_digest(file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    if _combine(digests) != stated:
        raise FiftyfoldError(f"{paths[-1]} was altered: its checksum does not fit; copy or export the folder again.")


def read_tensors(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Read all tensors into memory of their own.

    Raises:
        FiftyfoldError: as :func:`read_headers`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        with _opened(path) as file:
            tensors.update({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise FiftyfoldError(f"{path} is not there; the folder is incomplete, export it again.") from error
    except (SafetensorError, OSError) as error:
        raise FiftyfoldError(f"{path} is truncated or altered ({error}); copy or export the folder again.") from error


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous()
    state = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    state.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return state.digest()


def _combine(digests: Iterator[bytes] | list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
