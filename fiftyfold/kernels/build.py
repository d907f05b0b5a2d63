"""Compiling the C++ kernels: once for each state of their sources, into a cache or into a wheel.

Whatever stands in ``cpp/*.cpp`` becomes one library with a plain C interface, free of torch's and Python's headers. It
finds torch's functions when it is loaded, so that one build serves every version of both. The processor it runs on is
asked for its instructions then, too; what built it does not matter.

A library's name holds a digest of its content. The system would load half a library as well, and end the process with a
bus error where the other half is missing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_replacement import sync
from fiftyfold.user_cache import user_cache_folder

SOURCES = Path(__file__).parent / "cpp"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel brings its library, if it brings one."""

COMPILER_VARIABLE = "CXX"
"""Environment variable: the command of the compiler."""

CACHE_VARIABLE = "FIFTYFOLD_KERNEL_CACHE"
"""Environment variable: the folder of compiled libraries, in place of one in the user's cache."""

# Fused multiply-adds would round the outputs otherwise than on other paths.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")

_SECONDS = 600
"""What the compiler may take; it takes some twenty."""


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler, ``$CXX`` or the first that is found, or None."""
    if command := shlex.split(os.environ.get(COMPILER_VARIABLE, "")):
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def source_key() -> str:
    """Return a digest of the sources and of what they are compiled for."""
    digest = hashlib.sha256(repr((FLAGS, platform.machine(), sys.platform)).encode())
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def prebuilt_library() -> Path | None:
    """Return the library that came with the package, unless its sources have changed since.

    Raises:
        FiftyfoldError: if it is not as it was built.
    """
    name = PREBUILT / f"kernels-{source_key()}.so"
    whole = _whole(name)
    if whole is None and (damaged := _built(name)):
        raise FiftyfoldError(f"{damaged[0]} is not as it was built; install fiftyfold anew")
    return whole


def compiled_library() -> Path:
    """Return the library in the cache, compiling it first where it is missing or not whole.

    Of several processes that need it at once, one compiles.

    Raises:
        FiftyfoldError: if there is no compiler, it fails, or the cache cannot be written.
    """
    command = compiler()
    if command is None:
        raise FiftyfoldError(_why_no_compiler())
    digest = hashlib.sha256((source_key() + _version(tuple(command))).encode()).hexdigest()[:16]
    folder = cache_folder()
    name = folder / f"kernels-{digest}.so"
    if (found := _whole(name)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock(name.with_suffix(".lock")):
            if (found := _whole(name)) is not None:
                return found
            for damaged in _built(name):
                damaged.unlink()
            return compile_library(name, command)
    except OSError as error:
        raise FiftyfoldError(
            f"the cache {folder} cannot be written ({error.strerror}); set {CACHE_VARIABLE}"
        ) from error


def cache_folder() -> Path:
    """Return the folder of compiled libraries."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return user_cache_folder()


def compile_library(file: Path, command: list[str], flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile all sources into a library, which appears when it is complete.

    Args:
        file: where to, before a digest of the content is added to the name; the folder exists.
        command: of the compiler.
        flags: for it.

    Returns:
        Where it is.

    Raises:
        FiftyfoldError: if the compiler fails, or takes more than ten minutes.
    """
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        done = _run([*command, *flags, "-o", str(unfinished), *sources, "-ldl"])
        if done.returncode or not unfinished.exists():
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "it said nothing")
            raise FiftyfoldError(f"{command[0]} could not compile the kernels ({reason.strip()})")
        sync(unfinished)
        return unfinished.replace(file.with_stem(f"{file.stem}-{_content_digest(unfinished)}"))


def _built(name: Path) -> list[Path]:
    """Return the libraries, whole or not, that were compiled into ``name`` with a digest of their content."""
    return sorted(name.parent.glob(f"{name.stem}-*{name.suffix}"))


def _whole(name: Path) -> Path | None:
    """Return the first of them whose content is what its name tells."""
    return next((file for file in _built(name) if file.stem.endswith(f"-{_content_digest(file)}")), None)


def _content_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _why_no_compiler() -> str:
    if chosen := os.environ.get(COMPILER_VARIABLE):
        return f"{COMPILER_VARIABLE} is {chosen!r}, which was not found; correct or unset it"
    return "no C++ compiler was found"


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"]).stdout


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise FiftyfoldError(f"{words[0]} did not end within {_SECONDS} seconds") from error
    except OSError as error:
        raise FiftyfoldError(f"{words[0]} could not be started ({error.strerror or error})") from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for the lock, which ends with the process that holds it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
