"""Mending Lightning's count of epochs, so that a resumed run can be resumed again."""

from __future__ import annotations

from lightning.pytorch import Trainer


def mend_epoch_count(trainer: Trainer) -> None:
    """Let the next epoch begin as one, after a resume from a checkpoint of an epoch's last batch.

    Lightning (2.6) then takes the epoch that follows for the rest of the one before: it neither counts it nor calls
    ``on_train_epoch_start``. Checkpoints of such a run are off by an epoch, and a resume from one of those trains an
    epoch too many. To be called in ``on_train_start``; doing it again changes nothing.
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.total
    if loop.restarted_mid_epoch and epochs.ready == epochs.started == epochs.processed == epochs.completed:
        loop.reset_restart_stage()
