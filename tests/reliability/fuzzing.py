"""Runs the fuzz targets: by coverage with atheris, each target in a process of its own, within walls."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fiftyfold.errors import FiftyfoldError

MEMORY_BYTES = 2 * 2**30
"""What a reader may take beyond what the process has when it starts to read."""

_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Walls:
    """Notes what a reader must not do: run programs, unpickle, open connections, write outside its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.breach: str | None = None
        self.up = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.up:
            return
        if event in _FORBIDDEN:
            self.breach = f"{event}{arguments!r}"[:300]
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            self._check(event, arguments[0])
        elif event in _WRITES and not (event in ("os.remove", "os.rmdir") and arguments[1] != -1):
            self._check(event, arguments[0])  # what shutil removes relative to an open folder has no path

    def _check(self, event: str, path: object) -> None:
        place = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if place and not place.startswith((self._folder, "/dev/null")):
            self.breach = f"{event} {place}"


class Fuzzer:
    """Feeds one target, counts, and keeps one example of each way to fail."""

    def __init__(self, target: Any, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.seeds: list[bytes] = target.prepare(folder)
        self.inputs = 0
        self.refused = 0
        self.failures: dict[str, dict[str, str]] = {}
        self._walls = Walls(folder)

    def feed(self, data: bytes) -> None:
        """Read one input."""
        self.inputs += 1
        walls = self._walls
        walls.breach, walls.up = None, True
        try:
            self.target.read(data, self.folder)
        except (FiftyfoldError, *self.target.documented) as error:
            walls.up = False
            self.refused += 1
            if allocation := _allocation(error):
                self._fail(f"memory: {allocation}", data, error)
            elif isinstance(error, FiftyfoldError) and (len(str(error)) > 3000 or not str(error).strip()):
                self._fail("a message that is no sentence", data, error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of Rust's is no Exception
            walls.up = False
            self._fail(f"{type(error).__name__} in {_place(error)}", data, error)
        finally:
            walls.up = False
        if walls.breach is not None:
            self._fail(f"breach: {walls.breach}", data, None)

    def _fail(self, what: str, data: bytes, error: BaseException | None) -> None:
        if what not in self.failures:
            lines = traceback.format_exception(error)[-8:] if error else []
            self.failures[what] = {"input": data.hex()[:4000], "traceback": _last_lines("".join(lines))}

    def report(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "refused": self.refused, "failures": self.failures}


def limit_memory() -> None:
    """Let no header command more memory than :data:`MEMORY_BYTES`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz_all(inputs: int, seed: int, only: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Fuzz every target, coverage-guided; tell what came of it, target by target.

    Args:
        inputs: of all targets together.
        seed: libFuzzer's.
        only: parts of the names of the targets to fuzz; all if there is none.
        say: called with what came of each.
    """
    import atheris

    with atheris.instrument_imports(include=["fiftyfold"], enable_loader_override=False):
        from tests.reliability.fuzz_targets import TARGETS
    import torch

    torch.set_num_threads(1)
    chosen = [target for target in TARGETS if not only or any(part in target.name for part in only)]
    whole = sum(target.weight for target in chosen)
    for target in chosen:
        begin = time.monotonic()
        result = _fuzz_in_processes(target, -(-inputs * target.weight // whole), seed)
        say({"target": target.name, "seconds": round(time.monotonic() - begin, 1), **result})


def _fuzz_in_processes(target: Any, inputs: int, seed: int) -> dict[str, Any]:
    """A reader that takes its process down is started again on the inputs that are left."""
    total: dict[str, Any] = {"inputs": 0, "refused": 0, "failures": {}}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for start in range(6):
            folder = Path(place) / str(start)
            folder.mkdir()
            process = os.fork()
            if process == 0:
                _fuzz_here(target, inputs - total["inputs"], seed + start, folder)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            result = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
            total["inputs"] += result.get("inputs", 0)
            total["refused"] += result.get("refused", 0)
            total["failures"] |= result.get("failures", {})
            if total["inputs"] >= inputs:
                break
            last = (folder / "last").read_bytes().hex()[:4000] if (folder / "last").exists() else ""
            death = {"input": last, "traceback": _last_lines((folder / "log").read_text(errors="replace"))}
            total["failures"][f"the process ended with {status}"] = death
    return total


def _fuzz_here(target: Any, inputs: int, seed: int, folder: Path) -> NoReturn:
    """Run one target in this process until ``inputs`` were read, and end the process."""
    import atheris

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    scratch, corpus = folder / "scratch", folder / "corpus"
    scratch.mkdir()
    corpus.mkdir()
    fuzzer = Fuzzer(target, scratch)
    for place, content in enumerate(fuzzer.seeds):
        (corpus / str(place)).write_bytes(content)
    limit_memory()
    last = (folder / "last").open("wb")

    def read(data: bytes) -> None:
        last.seek(0)
        last.write(data)
        last.truncate()
        last.flush()
        fuzzer.feed(data)
        if fuzzer.inputs % 200 == 0 or fuzzer.inputs >= inputs:
            (folder / "report.json").write_text(json.dumps(fuzzer.report()))
        if fuzzer.inputs >= inputs:
            os._exit(0)

    def mutate(data: bytes, limit: int, mutation_seed: int) -> bytes:
        source = random.Random(mutation_seed)
        if not data or source.random() < 0.1:
            data = source.choice(fuzzer.seeds)
        if source.random() < 0.3:
            return atheris.Mutate(data, limit)
        return target.mutate(data, source, limit)

    # Ten minutes without an end are a failure; a process that was stopped meanwhile is taken for one that hangs.
    options = [f"-max_len={target.longest}", f"-seed={seed}", "-rss_limit_mb=0", "-timeout=600", "-print_final_stats=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()
    os._exit(1)


def _allocation(error: BaseException | None) -> str | None:
    """Return the message of a refused allocation among the causes of an error."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "allocate memory" in text or "bad alloc" in text:
            return text[:100] or "MemoryError"
        error = error.__cause__ or error.__context__
    return None


def _last_lines(text: str, longest: int = 3000) -> str:
    """Return the end of a text, in whole lines, so that no path in it is cut."""
    return text if len(text) <= longest else text[-longest:].partition("\n")[2]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/fiftyfold/" in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}, from {Path(frames[-1].filename).name}:{frames[-1].name}"


def main() -> None:
    """Arguments: the number of inputs, the seed, and perhaps parts of targets' names. Prints one JSON line a target."""
    fuzz_all(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:], lambda result: print(json.dumps(result), flush=True))


if __name__ == "__main__":
    main()
