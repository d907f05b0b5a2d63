"""The copies of a module that weight-averaging callbacks keep, and what must not be averaged in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_copies(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the copies of the module that weight-averaging callbacks keep."""
    for average in _averages(trainer):
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, LightningModule):
            yield average


def leave_integers_whole(trainer: Trainer) -> None:
    """Let averages take over integers as they are; doing it again changes nothing.

    An exponential average of equal integers, computed in floating point and cut off, may come out one below them; where
    they are codes of weights, those are other weights.
    """
    for average in _averages(trainer):
        if not isinstance(average, AveragedModel):
            continue
        if average.avg_fn is not None and not isinstance(average.avg_fn, _FloatsOnly):
            average.avg_fn = _FloatsOnly(average.avg_fn)
        if average.multi_avg_fn is not None and not isinstance(average.multi_avg_fn, _FloatListsOnly):
            average.multi_avg_fn = _FloatListsOnly(average.multi_avg_fn)


@dataclass(frozen=True)
class _FloatsOnly:
    average: Callable[[Tensor, Tensor, Tensor | int], Tensor]

    def __call__(self, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        return self.average(averaged, current, count) if averaged.is_floating_point() else current


@dataclass(frozen=True)
class _FloatListsOnly:
    average: Callable[[Any, Any, Tensor | int], None]

    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Average tensors of one type, as torch groups them."""
        if averaged[0].is_floating_point():
            self.average(averaged, current, count)
            return
        for mine, other in zip(averaged, current, strict=True):
            mine.copy_(other)


def _averages(trainer: Trainer) -> Iterator[object]:
    for callback in trainer.callbacks:
        yield getattr(callback, "_average_model", None)
