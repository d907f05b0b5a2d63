"""When something is to happen in a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch import Trainer

from fiftyfold.errors import FiftyfoldError

When = int | float | str
"""A whole number: optimizer steps. A number between 0 and 1: a fraction of training.
Or ``"step:100"``, ``"epoch:3"``, ``"fraction:0.25"``."""

_Value = TypeVar("_Value")

_UNITS = ("step", "epoch", "fraction")


@dataclass(frozen=True)
class Moment:
    """A point in a training run, counted in ``unit``s from its beginning."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, when: When) -> Moment:
        """Read a moment as a user writes it.

        Raises:
            FiftyfoldError: if ``when`` is not a moment.
        """
        unit, number = _split(when)
        amount = float(number)
        if unit == "step" and not amount.is_integer():
            raise FiftyfoldError(f"{when!r}: steps are whole numbers; write e.g. 100 or 'fraction:0.25'.")
        if amount < 0 or (unit == "fraction" and amount >= 1):
            raise FiftyfoldError(f"{when!r} lies outside training; a fraction goes from 0 up to, not including, 1.")
        return cls(amount, unit)

    def estimate(self, trainer: Trainer) -> float:
        """Return the optimizer step near which this moment is to come, by the Trainer's estimate, before rounding.

        It tells which of two moments comes first, and is the very step where one optimizer steps as often each epoch.

        Args:
            trainer: one that is about to train, so that the number of its batches is known.

        Raises:
            FiftyfoldError: if the length of training, or of an epoch, is not known.
        """
        if self.unit == "step":
            return self.amount
        if self.unit == "epoch":
            length = float(trainer.num_training_batches / trainer.accumulate_grad_batches)
        else:
            length = float(trainer.estimated_stepping_batches)
        if not 0 < length < math.inf:
            raise FiftyfoldError(f"{self}: the training loader or the Trainer has no known length; write 'step:…'.")
        return self.amount * math.ceil(length)

    def steps_left(self, trainer: Trainer, batch_idx: int) -> int:
        """Return in how many optimizer steps this moment comes; it has come if that is not above 0.

        Only a moment written in steps, and a share of ``max_steps``, look at ``trainer.global_step``: several
        optimizers, steps by hand and an accumulation that changes all make it run at a pace that nobody knows
        beforehand. Epochs, and shares of ``max_epochs``, are counted by the epoch and its batches.

        Args:
            trainer: one that trains, with what :meth:`estimate` asks for.
            batch_idx: of the batch about to be trained on, in its epoch.
        """
        if self.unit == "step":
            return int(self.amount) - int(trainer.global_step)
        if self.unit == "epoch":
            return _steps_to_share(self.amount, 1, trainer, batch_idx)
        # Training ends at whichever limit comes first.
        left: list[int] = []
        if trainer.max_steps != -1:
            left.append(round(self.amount * trainer.max_steps) - int(trainer.global_step))
        if trainer.max_epochs not in (None, -1) and trainer.num_training_batches < math.inf:
            left.append(_steps_to_share(self.amount, trainer.max_epochs, trainer, batch_idx))
        return min(left)

    def __str__(self) -> str:
        return f"{self.unit}:{self.amount:g}"


def read_schedule(schedule: Mapping[Any, _Value], owner: str) -> dict[Moment, _Value]:
    """Read what is to begin when, as a user writes it.

    Args:
        schedule: values by the moments at which they begin.
        owner: how messages call whom it belongs to.

    Raises:
        FiftyfoldError: if there is nothing, a key is no moment, or two keys are the same one.
    """
    read: dict[Moment, _Value] = {}
    for when, value in schedule.items():
        moment = Moment.parse(when)
        if moment in read:
            raise FiftyfoldError(f"{owner} names the moment {moment} twice; leave one of the two out.")
        read[moment] = value
    if not read:
        raise FiftyfoldError(f"{owner} names no moment at all; give at least one.")
    return read


def _steps_to_share(share: float, epochs: int, trainer: Trainer, batch_idx: int) -> int:
    """Count the steps up to a ``share`` of ``epochs``, as if every epoch had as many steps as this one."""
    length: int = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    place: int = trainer.current_epoch * length + batch_idx // trainer.accumulate_grad_batches
    return round(share * (epochs * length)) - place


def _split(when: When) -> tuple[str, str]:
    # YAML's mapping keys arrive as text, so plain numbers are read from text too.
    match = re.fullmatch(r"(?:(\w+):)?(\d+(?:\.\d*)?)", str(when).strip()) if not isinstance(when, bool) else None
    unit = match and (match[1] or ("fraction" if "." in match[2] and float(match[2]) != 0 else "step"))
    if match is None or unit not in _UNITS:
        raise FiftyfoldError(
            f"{when!r} is no moment; write a step (100), a fraction (0.25), 'step:100', 'epoch:3' or 'fraction:0.25'."
        )
    return unit, match[2]
