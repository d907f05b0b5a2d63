"""What the compressing callbacks share: when to act, and how a Trainer stays whole when its model changes."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from fiftyfold.callbacks.loop_progress import mend_epoch_count
from fiftyfold.callbacks.moment import Moment
from fiftyfold.callbacks.optimizer_groups import GroupNames, group_names, restore_groups
from fiftyfold.callbacks.sharding import (
    after_sharding,
    before_sharding,
    check_before_loading,
    holds_shards,
    replay_checkpoint,
    shards,
    share_new_parameters,
)
from fiftyfold.callbacks.weight_averages import averaged_copies, leave_integers_whole
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.checkpoint import SHARDED_LOGS_KEY
from fiftyfold.modules.layer_reduction import OPERATION as REDUCTION
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.structure import (
    Operation,
    apply_operation,
    check_order,
    compression_root,
    encode_log,
    let_rewind,
    listen,
    logs_by_part,
    replay,
    structure_log,
)
from fiftyfold.modules.surgery import parameter_checksum

_NAMES_KEY = "fiftyfold_optimizer_names"


@dataclass(frozen=True)
class Event:
    """One operation that a callback is to carry out."""

    moment: Moment
    name: str
    """Distinguishes it from every other event; the log keeps it, and an event that the log has is not repeated."""


class OperationCallback(Callback, ABC):
    """Carries out operations on a LightningModule that need not know of them, at optimizer-step boundaries.

    The model carries what was done (see :mod:`fiftyfold.modules.structure`), so that a checkpoint from before, at or
    after any operation resumes as if training had never stopped. The callback itself holds no progress.
    """

    operation: str
    """Kind of the operation, as the log names it."""
    changes_shapes: bool
    """Whether parameters come or go, which strategies that shard can follow only before they shard."""
    steps_down: bool = False
    """Whether each event goes further than those before it, so that one that a later one has overtaken is left out."""

    def __init__(self) -> None:
        self._last_step: int | None = None
        self._due: list[tuple[int, Event]] = []
        self._done_earlier: set[str | None] = set()
        self._names: list[GroupNames] | None = None

    @property
    def operations(self) -> tuple[str, ...]:
        """Kinds of all operations of one event, in their order."""
        return (self.operation,)

    @property
    @abstractmethod
    def events(self) -> list[Event]:
        """What is to happen, in its order."""

    @abstractmethod
    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:
        """Decide what exactly ``event`` does to ``root``, the same on every rank."""

    @abstractmethod
    def describe(self, operation: Operation, root: nn.Module) -> str:
        """Say in one line what was done."""

    def give_values(self, root: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Fill what the operation just planned has created in ``root`` with values that its log entry does not hold.

        Args:
            root: what the operation changed, or an averaged copy of it.
            optimizers: that train ``root``.
        """

    def follow_ups(self, root: nn.Module, trainer: Trainer) -> Sequence[Operation]:  # noqa: ARG002
        """Return further operations that belong to the one just carried out on ``root``; no step lies between them."""
        return ()

    def layers_after(self, event: Event, total: int) -> int:  # noqa: ARG002
        """Return how many layers ``event`` leaves of ``total``.

        Raises:
            FiftyfoldError: if it cannot be carried out on so many.
        """
        return total

    def prepare(self, root: nn.Module, trainer: Trainer) -> None:
        """Do to ``root`` what cannot be done once it is sharded; doing it again changes nothing."""
        done = _done(root)
        for event in self.events:
            if self.changes_shapes and event.name not in done:
                if holds_shards(root):
                    raise FiftyfoldError(
                        f"{event.name} cannot change layers that configure_model builds and shards at once; build them "
                        "in __init__."
                    )
                operation = {**self.plan(event, root, trainer), "by": event.name}
                known = {id(parameter) for parameter in root.parameters()}
                apply_operation(root, operation)
                share_new_parameters(root, known, trainer)
                rank_zero_info(f"Before sharding: {self.describe(operation, root)}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module, and every averaged copy of it, take its structure from a checkpoint."""
        self._refuse_partners(trainer)
        if shards(trainer.strategy) and stage == "fit":
            self._refuse_late_events(trainer)
        if shards(trainer.strategy) and next(operation_callbacks(trainer)) is self:
            # A run that ended with an error leaves its own behind.
            after_sharding(trainer, pl_module)
            before_sharding(trainer, pl_module, lambda: _prepare_all(trainer, pl_module, stage))
            check_before_loading(trainer, pl_module)
        if stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                "Lightning hands the weights back to the process that called fit, whose module is not compressed; "
                "call fit inside `with fiftyfold.modules.structure.replaying():`, or load a checkpoint afterwards."
            )
        for module in (pl_module, *averaged_copies(trainer)):
            listen(module)
        # A fit goes on from what the module is; an evaluation may look back.
        let_rewind(pl_module, stage != "fit")
        # Before anything is done to the module, or loaded, for this run.
        self._done_earlier = _done(compression_root(pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Leave the module as other Trainers expect it."""
        let_rewind(pl_module, allowed=False)
        if shards(trainer.strategy):
            after_sharding(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Arrange the optimizers' parameters as in the run that saved the checkpoint, before their state loads."""
        self._last_step = None
        if self._names is not None:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer, names in zip(trainer.optimizers, self._names, strict=False):
                restore_groups(optimizer, pl_module, names, schedules)
            self._names = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule and refuse one that cannot be kept."""
        mend_epoch_count(trainer)
        leave_integers_whole(trainer)
        due = sorted(((event.moment.estimate(trainer), event) for event in self.events), key=lambda entry: entry[0])
        self._due = _without_collisions([(round(step), event) for step, event in due], trainer)
        length = trainer.estimated_stepping_batches
        for step, event in self._due:
            if 0 < length <= step:
                rank_zero_warn(
                    f"{event.name} is due at step {step}, but by the Trainer's estimate training ends after {length}: "
                    "it never comes; choose an earlier moment, or train longer."
                )
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self._announce_repetitions()
        callbacks = list(operation_callbacks(trainer))
        if callbacks[-1] is self:
            _refuse_impossible(callbacks, compression_root(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Carry out what is due, but not between the micro-batches of one optimizer step of one epoch."""
        step = trainer.global_step
        if step == self._last_step and batch_idx > 0:
            return
        self._last_step = step
        for event in self.due_now(compression_root(pl_module), trainer, batch_idx):
            self._carry_out(event, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was left undone, be it that training stopped early or that its length was estimated wrongly."""
        root = compression_root(pl_module)
        done, waiting = _done(root), [event for _, event in self.pending(root)]
        for _, event in self._due:
            if event.name not in done:
                why = f"training ended before that, at step {trainer.global_step}"
                rank_zero_warn(
                    f"{event.name}, due at {event.moment}, was not carried out: "
                    f"{why if event in waiting else 'a later moment of its schedule came first'}; "
                    "if it is to happen, choose an earlier moment, or train on."
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the names of the optimizers' parameters beside the optimizers' states."""
        checkpoint[_NAMES_KEY] = [group_names(optimizer, pl_module) for optimizer in trainer.optimizers]
        if shards(trainer.strategy):
            checkpoint[SHARDED_LOGS_KEY] = {part: encode_log(log) for part, log in logs_by_part(pl_module).items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Take those names out again; they are used when the optimizers exist."""
        # A checkpoint that is only tested says nothing about the fit that may follow, and a sharded module has its
        # optimizers' state already, whose parameters have not changed since they were configured.
        if trainer.state.fn == TrainerFn.FITTING and not shards(trainer.strategy):
            self._names = checkpoint.get(_NAMES_KEY)

    def pending(self, root: nn.Module) -> list[tuple[int, Event]]:
        """Return the events that ``root`` is still to have, each with the optimizer step where it is expected."""
        done = _done(root)
        had = [at for at, (_, event) in enumerate(self._due) if event.name in done]
        first = had[-1] if had and self.steps_down else 0
        return [(step, event) for step, event in self._due[first:] if event.name not in done]

    def due_now(self, root: nn.Module, trainer: Trainer, batch_idx: int) -> list[Event]:
        """Return the events whose moment has come, in their order."""
        return [event for _, event in self.pending(root) if event.moment.steps_left(trainer, batch_idx) <= 0]

    def _refuse_partners(self, trainer: Trainer) -> None:
        mine = type(self).__name__
        for callback in trainer.callbacks:
            if isinstance(callback, ModelPruning):
                raise FiftyfoldError(
                    f"{mine} does not work beside {type(callback).__name__}, whose masks quantizers cannot keep and "
                    "checkpoints leave out; prune in a run of its own, before this one."
                )
            if isinstance(callback, WeightAveraging) and shards(trainer.strategy):
                raise FiftyfoldError(
                    f"{type(callback).__name__} cannot average a model that {type(trainer.strategy).__name__} shards; "
                    "leave it out, or train with strategy='ddp'."
                )

    def _announce_repetitions(self) -> None:
        for _, event in self._due:
            if event.name in self._done_earlier:
                rank_zero_warn(
                    f"{event.name} was done to this model in an earlier run, and is skipped; to do it again, train a "
                    "fresh model, or call the plain function of fiftyfold.modules before the Trainer gets the model."
                )

    def _refuse_late_events(self, trainer: Trainer) -> None:
        late = next((event for event in self.events if self.changes_shapes and event.moment.amount > 0), None)
        if late is not None:
            raise FiftyfoldError(
                f"{late.name} at {late.moment} would change a model that {type(trainer.strategy).__name__} has sharded "
                "by then; let it happen at step 0, train with strategy='ddp', or change the model with the plain "
                "function before the Trainer gets it."
            )

    def _carry_out(self, event: Event, trainer: Trainer, pl_module: LightningModule) -> None:
        root = compression_root(pl_module)
        before = _tensors(pl_module)
        operation = {**self.plan(event, root, trainer), "by": event.name}
        apply_operation(root, operation, trainer.optimizers)
        self.give_values(root, trainer.optimizers)
        for copy in averaged_copies(trainer):
            replay(compression_root(copy), structure_log(root))
            self.give_values(compression_root(copy))
        for further in self.follow_ups(root, trainer):
            apply_operation(root, {**further, "by": event.name}, trainer.optimizers)
        for copy in averaged_copies(trainer):
            replay(compression_root(copy), structure_log(root))
        if isinstance(trainer.strategy, DDPStrategy) and _tensors(pl_module) != before:
            _wrap_again(trainer.strategy)
        if trainer.world_size > 1:
            _compare_ranks(trainer, pl_module)
        rank_zero_info(f"Step {trainer.global_step}: {self.describe(operation, root)}")


def operation_callbacks(trainer: Trainer) -> Iterator[OperationCallback]:
    """Yield the compressing callbacks of ``trainer`` in their order."""
    for callback in trainer.callbacks:
        if isinstance(callback, OperationCallback):
            yield callback


def batch_mask(batch: Any) -> torch.Tensor | None:
    """Return the batch's attention mask, ``[batch, length]``, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, torch.Tensor) else None


def _done(root: nn.Module) -> set[str | None]:
    return {operation.get("by") for operation in structure_log(root)}


def _without_collisions(due: list[tuple[int, Event]], trainer: Trainer) -> list[tuple[int, Event]]:
    """Refuse events of one callback that fall on one step; a trial of a few batches leaves out all but the last."""
    kept = due[:1]
    for step, event in due[1:]:
        if step == kept[-1][0]:
            both = f"{kept[-1][1].name} and {event.name} fall on the same optimizer step, {step}"
            if not trainer.fast_dev_run:
                raise FiftyfoldError(f"{both}; choose moments further apart, or train longer.")
            rank_zero_warn(f"{both}, under fast_dev_run; the first of the two is left out.")
            kept.pop()
        kept.append((step, event))
    return kept


def _prepare_all(trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Bring a module into the structure in which it is to be sharded."""
    # Otherwise it is what an earlier fit of this Trainer was given.
    if trainer._checkpoint_connector._user_managed and trainer.ckpt_path is not None:
        replay_checkpoint(trainer.ckpt_path, pl_module)
    if stage == "fit":
        for callback in operation_callbacks(trainer):
            callback.prepare(compression_root(pl_module), trainer)


def _refuse_impossible(callbacks: list[OperationCallback], root: nn.Module) -> None:
    """Go through what all callbacks still have to do, in its order, without doing it."""
    names = [event.name for callback in callbacks for event in callback.events]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FiftyfoldError(
            f"{twice} is scheduled twice, and the log tells events apart by name; "
            "merge the callbacks or vary an argument."
        )
    events = ((step, at, event) for at, callback in enumerate(callbacks) for step, event in callback.pending(root))
    pending = sorted(events, key=lambda entry: entry[:2])
    check_order(structure_log(root), [name for _, position, _ in pending for name in callbacks[position].operations])
    if any(callbacks[position].operation == REDUCTION for _, position, _ in pending):
        total = len(layer_stack(root, find_layer_stack(root)))
        for _, position, event in pending:
            total = callbacks[position].layers_after(event, total)


def _tensors(module: nn.Module) -> list[int]:
    return [id(tensor) for tensors in (module.parameters(), module.buffers()) for tensor in tensors]


def _wrap_again(strategy: DDPStrategy) -> None:
    """DDP reduces the gradients of the parameters that it saw when it wrapped the module, and of no others."""
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()


def _compare_ranks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to go on with ranks that differ, in what each of them holds whole."""
    logs = zlib.crc32(json.dumps(logs_by_part(pl_module), sort_keys=True).encode())
    mine = torch.tensor([float(logs)], dtype=torch.float64, device=trainer.strategy.root_device)
    # FSDP shows a part of each parameter as if it were all of it.
    if not isinstance(trainer.strategy, FSDPStrategy):
        mine = torch.cat([mine, parameter_checksum(pl_module).to(mine.device)])
    sums = trainer.strategy.all_gather(mine)
    if not bool((sums == sums[0]).all()):
        raise FiftyfoldError("the ranks' models differ after a compression; they must be equal before it.")
