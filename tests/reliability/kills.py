"""SIGKILL at random moments of a compressing run, a resume after each, and the same bytes in the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fiftyfold
from tests.reliability.commands import (
    Run,
    compress_words,
    export_hash,
    fit_words,
    latest_checkpoint,
    make_place,
    training_hash,
)


@dataclass
class KillReport:
    """What a series of kills came to."""

    kills: int = 0
    kills_while_writing: int = 0
    runs_finished: int = 0
    runs_equal: int = 0
    resumed_from_a_checkpoint: int = 0
    broken_files: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def survived(self) -> bool:
        return not self.failures and not self.broken_files and self.runs_equal == self.runs_finished > 0


@dataclass(frozen=True)
class Subject:
    """A command that can be killed and repeated."""

    name: str
    words: Callable[[Path], list[str]]
    """Given the folder of the run, inside the current directory."""
    finished: Callable[[Path], bool]
    result: Callable[[Path], str]
    has_checkpoint: Callable[[Path], bool]


def _compress(folder: Path) -> list[str]:
    return compress_words(f"{folder.name}/small")


def _fit(folder: Path) -> list[str]:
    return fit_words(folder.name, resume=latest_checkpoint(folder))


SUBJECTS = (
    Subject(
        "compress",
        _compress,
        lambda folder: (folder / "small").exists() and not (folder / "small.work").exists(),
        lambda folder: export_hash(folder / "small"),
        lambda folder: (folder / "small.work" / "last.ckpt").exists(),
    ),
    Subject(
        "fit",
        _fit,
        lambda folder: (folder / "step=8.ckpt").exists(),
        lambda folder: training_hash(folder / "step=8.ckpt"),
        lambda folder: latest_checkpoint(folder) is not None,
    ),
)


def kill_many(
    subject: Subject, place: Path, *, at_random: int, while_writing: int, seed: int, progress: Any = None
) -> KillReport:
    """Kill a command again and again, until it has been killed so often and its last run has ended.

    Args:
        subject: the command.
        place: an empty folder.
        at_random: kills at moments drawn evenly over the time of an undisturbed run.
        while_writing: kills inside the writing of a file: at its first half, before its sync, before its rename.
        seed: fixes the moments.
        progress: called with the report after each kill.
    """
    torch.set_num_threads(1)
    make_place(place)
    report, source = KillReport(), random.Random(seed)
    begin = time.monotonic()
    expected = _finish(subject, place, place / "whole", report)
    duration = time.monotonic() - begin
    while expected is not None and report.kills + report.kills_while_writing < at_random + while_writing:
        folder = place / f"run{report.runs_finished}"
        folder.mkdir()
        for _ in range(1000):
            if report.kills < at_random and (source.random() < 0.5 or report.kills_while_writing >= while_writing):
                begin = time.monotonic()
                killed = _kill_at(subject, place, folder, source.uniform(0, duration))
                report.kills += killed
                if not killed:  # it was quicker than the first, which built the cache, or had a busier machine
                    duration = min(duration, time.monotonic() - begin)
            elif report.kills_while_writing < while_writing:
                killed = _kill_while_writing(subject, place, folder, source.randrange(60), source.randrange(3))
                report.kills_while_writing += killed
            else:
                break
            report.broken_files += _broken_files(folder)
            if progress is not None:
                progress(report)
            if not killed or report.broken_files:
                break
            report.resumed_from_a_checkpoint += subject.has_checkpoint(folder)
        result = _finish(subject, place, folder, report)
        report.runs_finished += 1
        report.runs_equal += result == expected
        if result != expected or report.broken_files:
            break
        shutil.rmtree(folder)
    return report


def _finish(subject: Subject, place: Path, folder: Path, report: KillReport) -> str | None:
    folder.mkdir(exist_ok=True)
    if not subject.finished(folder):
        status = Run(subject.words(folder), place).wait()
        # Killed between the last rename and the removal of the work folder, a command refuses to do it all again.
        if status != 0 and not (folder / "small").exists():
            report.failures.append(f"status {status} on {folder.name}: {_tail(place / 'run.log')}")
            return None
    return subject.result(folder)


def _kill_at(subject: Subject, place: Path, folder: Path, seconds: float) -> bool:
    run = Run(subject.words(folder), place)
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.is_going():
        time.sleep(0.002)
    run.send(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


def _kill_while_writing(subject: Subject, place: Path, folder: Path, count: int, how: int) -> bool:
    """Let the process kill itself at its ``count``-th file: half written, not yet synced, or not yet renamed."""
    return Run(subject.words(folder), place, lambda: _die_at_write(count, how)).wait() == -signal.SIGKILL


def _die_at_write(count: int, how: int) -> None:
    left = [count // 3]

    def die() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if how == 0:
        save = torch.save

        def torn_save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
            save(content, file, *arguments, **options)
            if left[0] == 0 and hasattr(file, "fileno"):
                file.flush()
                os.ftruncate(file.fileno(), file.tell() // 2)
            die()

        torch.save = torn_save
        return
    name = "fsync" if how == 1 else "rename"
    original = getattr(os, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        die()
        return original(*arguments, **options)

    setattr(os, name, patched)
    if how == 2:
        replace = os.replace

        def patched_replace(*arguments: Any, **options: Any) -> Any:
            die()
            return replace(*arguments, **options)

        os.replace = patched_replace


def _broken_files(folder: Path) -> list[str]:
    """Return the files under their final names that do not open."""
    broken = []
    for path in folder.rglob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001
            broken.append(f"{path.name}: {error}")
    if (folder / "small").exists():
        try:
            fiftyfold.load(folder / "small")
        except Exception as error:  # noqa: BLE001
            broken.append(f"small: {error}")
    return broken


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-600:] if path.exists() else ""
