"""The CPU's backend: the compiled library, where there is one, and torch's own operations elsewhere."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import prepacked
from fiftyfold.kernels.backends import Backend, register_backend
from fiftyfold.kernels.build import compiled_library, prebuilt_library

SOURCE_VARIABLE = "FIFTYFOLD_KERNELS"
"""Environment variable: ``prebuilt``, ``compiled`` or ``torch`` instead of the first of them that works."""

PATH_VARIABLE = "FIFTYFOLD_KERNEL_PATH"
"""Environment variable: the instruction set to use, one of :meth:`CpuLibrary.paths`, instead of the fastest."""

_log = logging.getLogger(__name__)

_forked = False


def _note_fork() -> None:
    """Remember that torch's threads, which may have been started by now, stayed in the parent."""
    global _forked  # noqa: PLW0603 - a fact about the process
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True)
class CpuLibrary:
    """The loaded library.

    Attributes:
        file: where it lies.
        source: ``prebuilt`` or ``compiled``.
        functions: what it exports, see ``cpp/api.h``.
    """

    file: Path
    source: str
    functions: ctypes.CDLL

    def paths(self) -> list[str]:
        """Return the instruction sets that it has for this processor, fastest first."""
        names: list[str] = []
        while name := self.functions.ff_supported_path(len(names)):
            names.append(name.decode())
        return names

    def path(self) -> str:
        """Return the instruction set in use."""
        name: bytes = self.functions.ff_path()
        return name.decode()

    def choose_path(self, name: str) -> None:
        """Use another instruction set from now on, for every thread.

        Raises:
            FiftyfoldError: if this processor has not got it.
        """
        if not self.functions.ff_choose_path(name.encode()):
            raise FiftyfoldError(f"this processor has no path {name!r}; it has {', '.join(self.paths())}.")

    def threads(self) -> int:
        """Return how many of torch's threads it uses; 1 in a process that was forked."""
        count: int = self.functions.ff_threads()
        return count

    def arrange(self, codes: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
        """Return codes (outputs, inputs) as the products read them, see ``cpp/arrangement.h``."""
        outputs, inputs = codes.shape
        codes = codes.contiguous()
        size = self.functions.ff_arranged_bytes(outputs, inputs, groups, bits)
        arranged = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.functions.ff_arrange(codes.data_ptr(), outputs, inputs, groups, bits, arranged.data_ptr())
        return arranged


@dataclass(frozen=True)
class Status:
    """What computes on the CPU.

    Attributes:
        library: the library in use, or None where torch's own operations compute.
        reason: why there is none.
    """

    library: CpuLibrary | None
    reason: str = ""


@functools.cache
def cpu_status() -> Status:
    """Find what computes on the CPU, once for the process: load the library, and compile it where it is missing.

    Raises:
        FiftyfoldError: if an environment variable asks for what there is not.
    """
    wanted = os.environ.get(SOURCE_VARIABLE, "auto")
    if wanted not in ("auto", "prebuilt", "compiled", "torch"):
        raise FiftyfoldError(f"{SOURCE_VARIABLE} must be auto, prebuilt, compiled or torch, not {wanted!r}.")
    if wanted == "torch":
        return _without_library(f"{SOURCE_VARIABLE} is torch")
    try:
        library = _load(wanted)
    except FiftyfoldError as error:
        if wanted != "auto":
            raise FiftyfoldError(f"{SOURCE_VARIABLE} is {wanted}, but {error}.") from error
        return _without_library(str(error))
    if path := os.environ.get(PATH_VARIABLE):
        library.choose_path(path)
    return Status(library)


def _without_library(reason: str) -> Status:
    if path := os.environ.get(PATH_VARIABLE):
        raise FiftyfoldError(
            f"{PATH_VARIABLE} is {path}, but torch's own operations compute here ({reason}), which have no paths; "
            "unset it."
        )
    return Status(None, reason)


@functools.cache
def announce_status() -> None:
    """Say once, in the log, what computes on the CPU: a warning where it is not the library."""
    _log.log(logging.INFO if cpu_status().library else logging.WARNING, "%s", describe_status())


def describe_status() -> str:
    """Say in one line what computes on the CPU, why, what it costs, and how to get the fast one."""
    status = cpu_status()
    if status.library is not None:
        return f"1- and 2-bit layers run on the {status.library.path()} kernels ({status.library.source})"
    return (
        f"1- and 2-bit layers run on torch's own operations ({status.reason}); that is several times slower than the "
        "kernels and takes a byte or more for each weight: install g++, or a wheel of fiftyfold for this platform"
    )


def _load(wanted: str) -> CpuLibrary:
    """Load the prebuilt library or, where there is none that works, the compiled one; or the one that is wanted."""
    reasons = []
    for source, find in (("prebuilt", prebuilt_library), ("compiled", compiled_library)):
        if wanted not in ("auto", source):
            continue
        try:
            if (file := find()) is not None:
                return open_library(file, source)
        except (FiftyfoldError, OSError) as error:
            reasons.append(str(error))
    raise FiftyfoldError("; ".join(dict.fromkeys(reasons)) or "this installation brings no library")


def open_library(file: Path, source: str) -> CpuLibrary:
    """Load a library and give it torch's threads; the operators stay as they are.

    Raises:
        FiftyfoldError: if the file cannot be loaded, or torch lacks what the library needs.
    """
    try:
        functions = ctypes.CDLL(str(file))
    except OSError as error:
        raise FiftyfoldError(f"{file} cannot be loaded ({error}); delete it, and it is compiled anew") from error
    functions.ff_attach.restype = functions.ff_path.restype = functions.ff_supported_path.restype = ctypes.c_char_p
    functions.ff_arranged_bytes.restype = ctypes.c_int64
    sizes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    functions.ff_arranged_bytes.argtypes = sizes
    functions.ff_arrange.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p]
    missing: bytes = functions.ff_attach(str(_torch_library()).encode())
    if missing:
        raise FiftyfoldError(
            f"torch {torch.__version__} lacks {missing.decode()}; the kernels need torch 2.10 or later"
        )
    if _forked:
        functions.ff_compute_alone()
    return CpuLibrary(file, source, functions)


def _torch_library() -> Path:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"


def _find() -> Backend | None:
    status = cpu_status()
    announce_status()
    if status.library is None:
        return prepacked.find()
    if status.library.functions.ff_register_operators():
        raise FiftyfoldError("torch did not take the CPU's operators; please report this as a bug.")
    return Backend(arrange=status.library.arrange)


register_backend("cpu", _find)
