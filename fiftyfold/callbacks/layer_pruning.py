"""Layer pruning at chosen moments of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from fiftyfold.callbacks.moment import When, read_schedule
from fiftyfold.callbacks.operation_callback import Event, OperationCallback, batch_mask
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.layer_pruning import ImportanceMeter, importance, pruning
from fiftyfold.modules.layer_reduction import OPERATION
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.structure import Operation, compression_root

_TOTALS_KEY = "fiftyfold_layer_importance"


class LayerPruning(OperationCallback):
    """Drops further layers on a schedule, each time those that did least on the training batches just before.

    Args:
        schedule: how many layers to drop, by the moment at which they go, e.g. ``{"fraction:0.2": 2, 0.4: 2}``; see
            :data:`~fiftyfold.callbacks.moment.When`. Nothing can be measured before the first step, so none is step 0.
        measure_steps: number of optimizer steps before each moment whose batches measure the layers' importance.
            Batches that are mappings with an ``attention_mask`` count their real tokens only.
    """

    operation = OPERATION
    changes_shapes = True

    def __init__(
        self, schedule: Mapping[str, int] | Mapping[int, int] | Mapping[When, int], measure_steps: int = 100
    ) -> None:
        super().__init__()
        if not schedule or any(drop < 1 for drop in schedule.values()):
            raise FiftyfoldError("LayerPruning's schedule says at which moments how many layers go, at least 1 each.")
        if measure_steps < 1:
            raise FiftyfoldError(f"measure_steps must be at least 1, not {measure_steps}.")
        self.schedule = read_schedule(schedule, "LayerPruning's schedule")
        self.measure_steps = measure_steps
        self._meter: ImportanceMeter | None = None
        self._restored: torch.Tensor | None = None

    @property
    def events(self) -> list[Event]:
        """One for each moment of the schedule."""
        return [
            Event(moment, f"LayerPruning({number}: drop {drop})")
            for number, (moment, drop) in enumerate(self.schedule.items(), start=1)
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen to the layers."""
        super().on_train_start(trainer, pl_module)
        root = compression_root(pl_module)
        first = self._due[0]
        if first[0] == 0:
            message = f"{first[1].name} falls on step 0, before any layer could be measured"
            if not trainer.fast_dev_run:
                raise FiftyfoldError(f"{message}; prune later.")
            rank_zero_warn(f"{message}; fast_dev_run leaves it out.")
            del self._due[0]
        self._close()
        self._meter = ImportanceMeter(layer_stack(root, find_layer_stack(root)))
        if self._restored is not None:
            self._meter.totals = self._restored
            self._restored = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune if that is due, and measure this batch if the next pruning is near."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._meter is not None:
            pending = self.pending(compression_root(pl_module))
            left = (event.moment.steps_left(trainer, batch_idx) for _, event in pending)
            self._meter.active = min(left, default=math.inf) <= self.measure_steps
            self._meter.mask = batch_mask(batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Leave validation batches out."""
        if self._meter is not None:
            self._meter.active = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the layers as they were."""
        super().on_train_end(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Leave the layers as they were."""
        self._close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what all ranks have measured so far."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._meter is not None:
            checkpoint[_TOTALS_KEY] = _over_ranks(self._meter.totals, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on measuring where the checkpoint stopped; the first rank takes over what all had measured."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._restored = checkpoint.get(_TOTALS_KEY) if fitting and trainer.is_global_zero else None

    def due_now(self, root: nn.Module, trainer: Trainer, batch_idx: int) -> list[Event]:
        """Prune once at a time: between two prunings lies a step that measures."""
        return super().due_now(root, trainer, batch_idx)[:1]

    def layers_after(self, event: Event, total: int) -> int:
        """Count the layers that would be left of ``total``."""
        drop = self.schedule[event.moment]
        if drop >= total:
            raise FiftyfoldError(f"{event.name} finds {total} layers; leave at least one.")
        return total - drop

    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:
        """Choose the layers that matter least on the batches of all ranks."""
        if self._meter is None:
            raise FiftyfoldError("LayerPruning acts while a Trainer trains; call prune_layers elsewhere.")
        measured = importance(_over_ranks(self._meter.totals, trainer))
        self._meter.reset()
        return pruning(root, self.schedule[event.moment], measured, step=trainer.global_step)

    def describe(self, operation: Operation, root: nn.Module) -> str:  # noqa: ARG002
        """Name the layers that stayed."""
        return f"pruned {operation['stack']!r} to layers {operation['layers']} of {operation['of']}."

    def _close(self) -> None:
        if self._meter is not None:
            self._meter.close()


def _over_ranks(totals: torch.Tensor, trainer: Trainer) -> torch.Tensor:
    summed = trainer.strategy.reduce(totals.clone(), reduce_op="sum")
    return summed if isinstance(summed, torch.Tensor) else totals
