"""StopOnSignal: SIGTERM and SLURM's pre-emption signal save the training and end it."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override


class StoppedBySignal(SystemExit):
    """Ends the process with the status that shells give to a signal: 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopOnSignal(Checkpoint):
    """Writes a checkpoint and leaves when SIGTERM or SIGUSR1 comes, at the next moment from which a resume is exact.

    That moment is the end of an optimizer step, of the validation that follows it, or of the epoch. Lightning itself
    ends on SIGTERM without saving, and saves on SLURM's signal at once, be it in the middle of a step. Under SLURM with
    automatic requeueing the job is requeued, and Lightning finds the checkpoint by itself.

    Args:
        path: the file to write; by default ``stopped.ckpt`` beside the Trainer's checkpoints.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = None
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handlers are in place by now. It puts back those that it found before.
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop._num_ready_batches_reached() and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._leave_if_told(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._leave_if_told(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: a resume does not know the scores by which others choose their checkpoints here.
        self._leave_if_told(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()
        if self._received is not None:  # too late to stop the training, but in time for what follows it
            signal.raise_signal(self._received)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = number

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was installed from C, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _leave_if_told(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not (loop._accumulated_batches_reached() or loop._num_ready_batches_reached()):
            return  # a checkpoint leaves out the gradients that wait for their step
        # Signals reach the ranks at different moments, or only one of them.
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._received = self._received or signal.SIGTERM
        if self._received is None:
            return
        number, environment = self._received, trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and number != signal.SIGTERM:
            trainer._signal_connector._slurm_sigusr_handler_fn(number, None)
            raise StoppedBySignal(number)
        path = self._path or _checkpoint_folder(trainer) / "stopped.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"stopped by {signal.Signals(number).name}; resume from {path}", file=sys.stderr)
        raise StoppedBySignal(number)


def _checkpoint_folder(trainer: Trainer) -> Path:
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
