"""Division by one number, with the same bits on every device."""

from __future__ import annotations

import torch


def divided(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return ``values / divisor``, rounded correctly.

    On CUDA torch multiplies by the reciprocal of a Python number, which misses some quotients by their last bit; by a
    tensor it divides.
    """
    return values / values.new_full((), divisor)
