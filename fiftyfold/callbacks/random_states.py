"""RandomStates: the random numbers of every process go on where the checkpoint left them."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from fiftyfold.callbacks.loop_progress import mend_epoch_count
from fiftyfold.errors import FiftyfoldError

CHECKPOINT_KEY = "fiftyfold_random_states"
"""Where a checkpoint holds the states: a list with one entry per process, in the order of the ranks."""


def capture_random_states() -> dict[str, Any]:
    """Return the states of torch's, NumPy's, Python's and the current CUDA device's global generators.

    The result holds tensors and numbers only, so that ``torch.load`` reads it without trusting the file.
    """
    _, words, position, has_gauss, gauss = np.random.get_state()
    version, python_words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": {
            "words": torch.from_numpy(np.asarray(words).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {
            "version": version,
            "words": torch.tensor(python_words, dtype=torch.int64),
            "gauss": python_gauss,
        },
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the generators back to what :func:`capture_random_states` saw.

    Raises:
        FiftyfoldError: if it is something else.
    """
    try:
        _restore(states)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise FiftyfoldError("the checkpoint's random states cannot be read; the checkpoint is corrupt.") from error


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    numpy_state = states["numpy"]
    words = numpy_state["words"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, numpy_state["position"], numpy_state["has_gauss"], numpy_state["gauss"]))
    python_state = states["python"]
    random.setstate((python_state["version"], tuple(python_state["words"].tolist()), python_state["gauss"]))


class RandomStates(Callback):
    """Carries every process's random states in the checkpoints, and restores them on resume.

    With a loader that finds its place again, a resumed training is then the one that was interrupted, dropout
    included. The states are put back just before the first batch that is trained on, so that nothing which runs at
    the start of a process can disturb them. They are also put back after each validation within the training, which a
    run that resumes at an epoch's end may not repeat, and whose loader alone draws from torch's generator.

    Gradients that are still being accumulated are in no Lightning checkpoint. A checkpoint taken between two
    optimizer steps, as validation can trigger it, therefore resumes with a smaller first step; a warning says so.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = capture_random_states()
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[CHECKPOINT_KEY] = states
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            rank_zero_warn(
                f"This checkpoint is taken after {batches} batches, between two optimizer steps, and leaves out the"
                " gradients accumulated since the last one; validate every so many batches as are a multiple of"
                f" accumulate_grad_batches={trainer.accumulate_grad_batches}."
            )

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._pending = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(self._pending, list | None):
            raise FiftyfoldError("the checkpoint's random states are no list; the checkpoint is corrupt.")
        if self._pending is None:
            rank_zero_warn(
                "The checkpoint was saved without RandomStates: dropout goes on with other random numbers, and the"
                " result differs from that of a run without a stop."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning gives a loader its state as it makes the loader. Where configure_optimizers asks for
        # trainer.estimated_stepping_batches, that is before the state is taken from the checkpoint.
        trainer.fit_loop._load_combined_loader_states()
        mend_epoch_count(trainer)
        self._before_validation = None
        if self._pending is not None:
            _name_forgetful_loaders(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._pending is None:
            return
        states, self._pending = self._pending, None
        if len(states) == trainer.world_size:
            restore_random_states(states[trainer.global_rank])
        else:
            rank_zero_warn(
                f"The checkpoint holds the random states of {len(states)} processes, but {trainer.world_size} train"
                " now: dropout goes on with other random numbers."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning makes the validation loader's iterator, which draws a seed, before on_validation_start; and until it
        # asks itself whether to validate, the clock or a callback that stops the training may make that due.
        if trainer.enable_validation:
            self._before_validation = capture_random_states()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._before_validation is not None and trainer.state.fn == TrainerFn.FITTING:
            restore_random_states(self._before_validation)
        self._before_validation = None


def _name_forgetful_loaders(trainer: pl.Trainer) -> None:
    """Warn of loaders that begin at their first batch, where the run that saved the checkpoint was further on."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    loaders = trainer.fit_loop._combined_loader
    if loaders is None or not 0 < done < trainer.num_training_batches:
        return
    for loader in loaders.flattened:
        if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
            source = type(getattr(loader, "dataset", loader)).__name__
            rank_zero_warn(
                f"The training loader {type(loader).__name__} of {source} keeps no state: after {done} batches of its"
                " epoch, training goes on with the epoch's first ones. Give it state_dict and load_state_dict, or"
                " resume from a checkpoint at an epoch's end."
            )
