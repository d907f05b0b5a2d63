"""What the file of a compiled program says about it, read without running anything of it."""

from __future__ import annotations

import json
import typing
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiftyfold.errors import FiftyfoldError

FORMAT = 1
"""Of the facts; another one is of another version of fiftyfold."""

_KEY, _FORMAT_KEY = "fiftyfold", "fiftyfold_format"
_INSTRUCTIONS = (
    *("sse", "ssse", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "aes", "vaes", "vpclmul", "gfni"),
    *("sha", "amx", "asimd", "sve", "sme", "bf16", "i8mm", "neon"),
)
"""How the names of instructions begin that a compiler takes by itself; other flags of a processor are the system's."""


@dataclass(frozen=True)
class ProgramFacts:
    """What a file says about its program.

    Attributes:
        model: the class that was compiled.
        device: ``cpu`` or ``cuda``.
        inputs: names of the program's inputs, each (sentences, tokens).
        longest: tokens that a sentence may have, if the model has a limit.
        words: entries of the vocabulary.
        types: kinds of token that a sentence may have, 0 for a model without such an input.
        output_module: where the class of its output is from.
        torch: the version that compiled it.
        library: whether it calls the CPU's library of kernels.
        instructions: what the processor that compiled it could do.
        sample: tokens of two sentences without padding.
        outputs: the first numbers that the model gave for them.
    """

    model: str
    device: str
    inputs: list[str]
    longest: int | None
    words: int
    types: int
    output_module: str
    torch: str
    library: bool
    instructions: list[str]
    sample: list[list[int]]
    outputs: list[float]

    def to_metadata(self) -> dict[str, str]:
        """Return what torch writes into the file."""
        return {_KEY: json.dumps(asdict(self)), _FORMAT_KEY: str(FORMAT)}


def read_facts(path: Path) -> ProgramFacts:
    """Read a file's facts, and compare its checksums.

    Raises:
        FiftyfoldError: if it is absent, corrupt, or not one of ours.
    """
    if not path.is_file():
        raise FiftyfoldError(f"there is no file {path}.")
    with _explained(path), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("torch compresses nothing, so what is compressed is a stranger's")
        if (broken := archive.testzip()) is not None:
            raise FiftyfoldError(f"{path} is corrupt: {broken} has another checksum; compile the model again.")
        name = next(name for name in archive.namelist() if name.endswith("wrapper_metadata.json"))
        metadata = json.loads(archive.read(name))
        written, content = metadata[_FORMAT_KEY], json.loads(metadata[_KEY])
        if written == str(FORMAT):
            return _checked(content)
    raise FiftyfoldError(f"{path} was compiled by another version of fiftyfold; compile the model again.")


def processor_instructions() -> list[str]:
    """Return what the processor can do, as Linux lists it, as far as a compiler makes use of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(flag for flag in next(found, []) if flag.startswith(_INSTRUCTIONS))


def _checked(content: dict[str, Any]) -> ProgramFacts:
    """Return the facts; a ValueError or TypeError says that some are missing or of another type."""
    facts = ProgramFacts(**content)
    for name, kind in typing.get_type_hints(ProgramFacts).items():
        if not _fits(getattr(facts, name), kind):
            raise ValueError(f"{name} has another type")
    lengths = {len(sentence) for sentence in facts.sample}
    if facts.device not in ("cpu", "cuda") or len(lengths) != 1 or 0 in lengths:
        raise ValueError("a device or sample that is none")
    return facts


def _fits(value: object, kind: Any) -> bool:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(entry, parts[0]) for entry in value)
    return isinstance(value, parts or kind)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError) as error:
        raise FiftyfoldError(f"{path} is corrupt ({error}); compile the model again.") from error
    except OSError as error:  # a directory of the archive that points before the file's beginning is one
        raise FiftyfoldError(f"{path} cannot be read ({error}); compile the model again.") from error
    except (StopIteration, KeyError, TypeError, ValueError, RuntimeError) as error:  # RecursionError is one of the last
        raise FiftyfoldError(f"{path} is not a program that fiftyfold compiled.") from error
