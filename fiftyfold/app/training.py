"""Training and scoring for the commands that build their own Trainer."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from transformers.utils.logging import disable_progress_bar

from fiftyfold.app.last_checkpoint import LastCheckpoint
from fiftyfold.callbacks import DurableCheckpointIO, RandomStates, StopOnSignal
from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
from fiftyfold.modules.task_module import TaskModule

OPTIONS_FILE = "options.json"
"""In a work folder: what the run was asked for."""

CONTENT = "content"
"""Among those options: digests of the models and data that it began with."""

SAVE_EVERY_STEPS = 200
"""Optimizer steps after which an interrupted run can lose no more."""

_EXPECTED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*number of training batches.*smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
)


def quiet_lightning() -> None:
    """Silence what the libraries say about hardware, workers and weights; errors and our own notices stay."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    disable_progress_bar()
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


def claim_output(folder: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be written.

    Raises:
        FiftyfoldError: if the folder exists and is not empty, is a file, or lies where nothing can be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FiftyfoldError(f"{folder} already holds something; name another output folder, or move that one away.")
    # The parent takes the folder under its name, which is made beside it.
    above = next(place for place in folder.absolute().parents if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise FiftyfoldError(
            f"{folder} cannot be written: {above} is read-only, or no folder; name an output folder elsewhere."
        )


@contextmanager
def work_folder(
    folder: Path, options: dict[str, Any], *, binding: Sequence[str] = (), kept: Sequence[str] = ()
) -> Iterator[Path | None]:
    """Keep a run's checkpoints in ``folder`` until it has ended well.

    Args:
        folder: the work folder. It goes when the block ends well, or fails before there is a checkpoint or anything
            that ``binding`` or ``kept`` names.
        options: all that decides the run, as JSON values, what it reads by its digests under :data:`CONTENT`; a run
            that has a checkpoint goes on only under the same.
        binding: files and folders inside that bind a run to its options as a checkpoint does.
        kept: files and folders inside that know by themselves what they belong to.

    Yields:
        The checkpoint to go on from, or None for a new run.

    Raises:
        FiftyfoldError: if the folder holds a run with other options that made something, a run that goes on just now,
            or something else.
    """
    stamp, last = folder / OPTIONS_FILE, folder / "last.ckpt"

    def has_any(*names: str) -> bool:
        return any((folder / name).exists() for name in names)

    if not stamp.is_file():
        claim_output(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(stamp, str(folder)):
        _stamp_options(stamp, json.dumps(options, indent=2), begun=has_any(last.name, *binding))
        try:
            yield last if last.is_file() else None
        except BaseException:
            if not has_any(last.name, *binding, *kept):
                remove_work_folder(folder)
            raise
        remove_work_folder(folder)


def remove_work_folder(folder: Path) -> None:
    """Remove a work folder, what tells whose it is at the end, so that a kill meanwhile leaves no riddle."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != OPTIONS_FILE:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _stamp_options(stamp: Path, options: str, *, begun: bool) -> None:
    found = stamp.read_text(encoding="utf-8")
    if not begun:
        stamp.write_text(options, encoding="utf-8")
    elif not _are_equal(chosen_options(found), chosen_options(options)):
        raise FiftyfoldError(
            f"{stamp.parent} holds an unfinished run with other options, or of a model or text that has changed; "
            "repeat that command to finish it, or delete the folder to begin anew."
        )


def _are_equal(found: Any, options: Any) -> bool:
    """Compare options; a version that did not look at models and data has nothing to say of them."""
    if isinstance(found, dict) and isinstance(options, dict) and CONTENT not in found:
        options = {name: value for name, value in options.items() if name != CONTENT}
    return bool(found == options)


def chosen_options(options: str) -> Any:
    """Return the options that are set: a version that knows more of them has the others unset."""
    try:
        return {name: value for name, value in json.loads(options).items() if value is not None}
    except (ValueError, AttributeError, RecursionError):
        return options


def train(
    module: TaskModule,
    data: LightningDataModule,
    *,
    epochs: int,
    work: Path,
    callbacks: tuple[Callback, ...] = (),
    checks_per_epoch: int = 1,
    resume_from: Path | None = None,
) -> None:
    """Train ``module`` and leave in it the weights of the best development score.

    Args:
        module: a fine-tuning or distillation module.
        data: its data.
        epochs: passes over the training data.
        work: folder for checkpoints and the log of metrics.
        callbacks: compression callbacks.
        checks_per_epoch: how often an epoch scores the development set.
        resume_from: a checkpoint of the same run.

    Raises:
        SystemExit: if Ctrl-C or a signal stopped the training; the last checkpoint stays in ``work``.
    """
    # At an epoch's end, Lightning's default, the best would come after the last: a run killed between the two, and
    # resumed from the last, has no scores any more to choose the best by.
    best = ModelCheckpoint(
        work,
        filename="best",
        monitor="val/score",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    last = LastCheckpoint(work / "last.ckpt", SAVE_EVERY_STEPS)
    stop = StopOnSignal(work / "last.ckpt")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=1,
        gradient_clip_val=1.0,
        val_check_interval=1.0 / checks_per_epoch,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, RandomStates(), best, last, stop, TQDMProgressBar(refresh_rate=20)],
        logger=CSVLogger(work, name="log", version=""),
        plugins=[DurableCheckpointIO()],
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    checkpoint = DurableCheckpointIO().load_checkpoint(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])


def score(module: TaskModule, data: LightningDataModule) -> dict[str, float]:
    """Return the development metrics of ``module`` by name, the selection metric under ``val/score``."""
    trainer = lightning.Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(refresh_rate=20)],
    )
    results = trainer.validate(module, datamodule=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}
