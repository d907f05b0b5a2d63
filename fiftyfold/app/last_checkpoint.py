"""The checkpoint from which an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint of the latest state: after every validation, and every so many optimizer steps.

    Lightning resumes a checkpoint that was taken between an epoch's last step and its validation without that
    validation, so that another checkpoint could be chosen as the best one. On such a step this one waits until the
    validation is done.

    Args:
        path: the file.
        every_steps: optimizer steps after which an interrupted run can lose no more.
    """

    def __init__(self, path: Path, every_steps: int) -> None:
        self._path = path
        self._every_steps = every_steps
        self._saved_at = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        validation_due = (batch_idx + 1) % int(trainer.val_check_batch or trainer.num_training_batches) == 0
        if not validation_due and trainer.global_step - self._saved_at >= self._every_steps:
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.global_step > self._saved_at:
            self._save(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step

    def _save(self, trainer: Trainer) -> None:
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self._path)
