"""Noticing a loss that is not a number, without making the device wait at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fiftyfold.errors import FiftyfoldError

_STEPS_BETWEEN_LOOKS = 50
_NEVER = torch.iinfo(torch.int64).max


class FiniteLossGuard:
    """Remembers on the device the first step whose loss was NaN or infinite.

    Reading a number from an accelerator stalls it, so there the memory is read only now and then; the step in the
    message is exact all the same. On a CPU it is read at once.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None
        self._unread = 0

    def note(self, loss: Tensor, step: int) -> None:
        """Take note of a loss.

        Args:
            loss: a scalar.
            step: the optimizer step that it belongs to.

        Raises:
            FiftyfoldError: if a loss was not finite.
        """
        value = loss.detach()
        bad = torch.where(torch.isfinite(value), _NEVER, step)
        self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)
        self._unread += 1
        if value.device.type == "cpu" or self._unread >= _STEPS_BETWEEN_LOOKS:
            self.check()

    def check(self) -> None:
        """Read the memory.

        Raises:
            FiftyfoldError: if a loss was not finite.
        """
        self._unread = 0
        if self._first_bad is None:
            return
        step, self._first_bad = int(self._first_bad), None
        if step != _NEVER:
            raise FiftyfoldError(
                f"the loss is not a finite number at step {step}; lower the learning rate, clip the gradients, or "
                "train in full precision."
            )
