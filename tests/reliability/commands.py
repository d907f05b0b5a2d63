"""Small runs of the command line, each in a process of its own that is forked from one that has imported everything."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fiftyfold.app import training
from fiftyfold.app.main import main
from fiftyfold.app.quickstart_task import write_task
from tests.app.conftest import write_teacher

FIT_STEPS = 8


def make_place(folder: Path) -> Path:
    """Write ``teacher`` and ``data`` into a folder: four steps an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    write_teacher(folder / "teacher")
    write_task(folder / "data", train_rows=60, dev_rows=16, seed=1)
    return folder


def compress_words(output: str = "small") -> list[str]:
    """A compression of eight steps with validation and a checkpoint after each: resumable everywhere."""
    options = {"data": "data", "epochs": "2", "batch_size": "16", "layers": "every-other", "output": output}
    return ["compress", "teacher", "--task", "sst2", *_flags(options)]


def fit_words(
    folder: str, *, resume: Path | None = None, callbacks: bool = True, weights_only: bool = False, **options: Any
) -> list[str]:
    """Eight steps in which quantizers step down and layers go, with dropout and shuffling, and a checkpoint each.

    Args:
        folder: where the checkpoints go.
        resume: the checkpoint to go on from.
        callbacks: whether the model is compressed.
        weights_only: whether the checkpoints hold weights alone.
        options: further options of ``fiftyfold fit``; ``trainer__max_epochs`` stands for ``trainer.max_epochs``.
    """
    model = {"model": "FineTuningModule", "model.model": "teacher"}
    data = {"data": "GLUEDataModule", "data.task": "sst2", "data.data": "data", "data.tokenizer": "teacher"}
    trainer = {"data.batch_size": "16", "trainer.max_epochs": "2", "trainer.logger": "false"}
    quiet = {"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"}
    words = ["fit", *_flags({**model, **data, **trainer, **quiet}), "--trainer.default_root_dir", folder]
    if callbacks:
        words += ["--trainer.callbacks+=QuantizationAwareTraining", '--trainer.callbacks.weight_bits={"2": 2, "6": 1}']
        words += ["--trainer.callbacks+=LayerReduction", "--trainer.callbacks.keep=3", "--trainer.callbacks.start=3"]
        words += ["--trainer.callbacks+=LayerPruning", '--trainer.callbacks.schedule={"5": 1}']
    words += [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={folder}",
    ]
    words += ["--trainer.callbacks.filename={step}", "--trainer.callbacks.every_n_train_steps=1"]
    words += ["--trainer.callbacks.save_top_k=-1", f"--trainer.callbacks.save_weights_only={str(weights_only).lower()}"]
    words += _flags({name.replace("__", "."): str(value) for name, value in options.items()})
    return words if resume is None else [*words, "--ckpt_path", str(resume)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step."""
    return max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), default=None)


class Run:
    """One command in a forked process, which leads a group of its own."""

    def __init__(self, words: list[str], place: Path, prepare: Callable[[], None] | None = None) -> None:
        self.process = os.fork()
        if self.process == 0:
            _become(words, place, prepare)

    def wait(self, seconds: float = 600) -> int:
        """Return the exit status, negative for a signal; after ``seconds`` kill the process."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.send(signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def is_going(self) -> bool:
        """Tell whether the process has not ended yet; what it ended with is left to :meth:`wait`."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: int) -> None:
        """Send a signal to the process, if it is still there."""
        os.kill(self.process, number)


def said(place: Path) -> str:
    """Return the last line that a run in ``place`` printed."""
    return (place / "run.log").read_text(errors="replace").strip().splitlines()[-1]


def content_hash(value: Any) -> str:
    """Return a hash over everything inside nested mappings and sequences, tensors by their bytes."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def training_hash(checkpoint: Path) -> str:
    """Return a hash over all that decides how a training goes on: weights, optimizer, schedule, random states, data."""
    content = torch.load(checkpoint, weights_only=True)
    # Names of files hang on the folder; how often a loop was restarted is no state of training.
    kept = {name: value for name, value in content.items() if name not in ("callbacks", "loops")}
    kept["callbacks"] = {key: value for key, value in content["callbacks"].items() if "ModelCheckpoint" not in key}
    return content_hash(kept)


def export_hash(folder: Path) -> str:
    """Return a hash over a delivered folder, but for times of computation and the picture that shows them."""
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".png":
            continue
        content = path.read_bytes()
        if path.name == "fiftyfold_report.json":
            report = json.loads(content)
            report["rows"] = [{k: v for k, v in row.items() if "latency" not in k} for row in report["rows"]]
            content = json.dumps(report).encode()
        state.update(f"{path.name} {len(content)} ".encode() + content)
    return state.hexdigest()


def _flags(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _become(words: list[str], place: Path, prepare: Callable[[], None] | None) -> None:
    status = 70
    try:
        os.setsid()
        os.chdir(place)
        log = os.open(place / "run.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)  # pytest's own do not go there
        # tqdm's own lock is shared with all forked processes, and stays locked when one is killed that holds it.
        tqdm.set_lock(threading.RLock())
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        training.SAVE_EVERY_STEPS = 1
        if prepare is not None:
            prepare()
        status = main(words)
    except BaseException:  # noqa: BLE001 - the child must end here
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}".encode())
        state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            state.update(f"{key!r}:".encode())
            _feed(state, item)
    elif isinstance(value, list | tuple):
        for item in value:
            state.update(b",")
            _feed(state, item)
    else:
        state.update(repr(value).encode())
