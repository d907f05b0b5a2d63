"""What is typed at a resume wins over what the checkpoint's states remember."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.optim import Optimizer
from typing_extensions import override


class TypedSettings(Callback):
    """Keeps settings of optimizers and of early stopping that a loaded state would overrule.

    An optimizer's state holds learning rate, decay and the like beside the moments, and torch puts them all back; so
    would a new learning rate have no effect on a resumed run, without a word.

    Args:
        optimizer: whether the optimizer is another than the checkpoint's, so that its settings are put right.
    """

    def __init__(self, optimizer: bool) -> None:
        self._optimizer = optimizer
        self._patience: dict[int, int] = {}
        self._settings: list[list[dict[str, Any]]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patience = {id(each): each.patience for each in trainer.callbacks if isinstance(each, EarlyStopping)}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.patience = self._patience[id(callback)]
        self._settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._optimizer:
            return
        for optimizer, settings in zip(trainer.optimizers, self._settings, strict=True):
            for group, typed in zip(optimizer.param_groups, settings, strict=True):
                _put_right(group, typed)
        for config in trainer.lr_scheduler_configs:
            _restart_from(config.scheduler)


def _put_right(group: dict[str, Any], typed: dict[str, Any]) -> None:
    base, typed_base = group.get("initial_lr"), typed.get("initial_lr")
    scheduled = base is not None and typed_base is not None
    group.update({name: value for name, value in typed.items() if name != "lr" or not scheduled})
    if scheduled and base != typed_base:
        group["lr"] *= typed_base / base if base else 0.0


def _restart_from(schedule: Any) -> None:
    """Let a schedule multiply the base rates that stand in its optimizer."""
    optimizer = getattr(schedule, "optimizer", None)
    if isinstance(optimizer, Optimizer) and hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
