"""Linear warm-up and decay, started anew in every stage of a training."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fiftyfold.errors import FiftyfoldError


def stage_ends(shares: Sequence[float], total_steps: int) -> list[int]:
    """Divide a training among its stages.

    Args:
        shares: what each stage gets, in any unit; only the proportions count.
        total_steps: optimizer steps of the whole training.

    Returns:
        The step after the last one of each stage; the last entry is ``total_steps``.

    Raises:
        FiftyfoldError: if a stage would have no step.
    """
    if not shares or any(share <= 0 for share in shares):
        raise FiftyfoldError(f"every stage needs a positive share of the training, not {list(shares)}.")
    whole = sum(shares)
    ends = [round(total_steps * part / whole) for part in accumulate(shares)]
    if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
        raise FiftyfoldError(
            f"{total_steps} optimizer steps cannot be divided among {len(shares)} stages; train longer or in one stage."
        )
    return ends


def stage_at(step: int, ends: Sequence[int]) -> int:
    """Return the index of the stage to which an optimizer step belongs; steps past the end belong to the last."""
    return min(bisect.bisect_right(ends, step), len(ends) - 1)


def learning_rate_factor(step: int, ends: Sequence[int], warmup: float) -> float:
    """Return the factor on the learning rate at one optimizer step.

    Within its stage it rises linearly from 0 to 1 and falls linearly to 0: transformers'
    ``get_linear_schedule_with_warmup``, which XTC uses.

    Args:
        step: optimizer steps done so far.
        ends: as :func:`stage_ends` returns them.
        warmup: share of each stage over which the rate rises, at least 0 and below 1.
    """
    stage = stage_at(step, ends)
    start = ends[stage - 1] if stage else 0
    length, done = ends[stage] - start, step - start
    rise = round(warmup * length)
    if done < rise:
        return done / rise
    return max(0.0, (length - done) / max(1, length - rise))


def linear_schedule(optimizer: Optimizer, ends: Sequence[int], warmup: float) -> dict[str, Any]:
    """Return Lightning's description of a schedule that follows :func:`learning_rate_factor` at every step."""
    # A partial of a plain function leaves no state of its own in the checkpoint: a resumed training takes its length
    # from its own trainer, so that it can be made longer.
    scheduler = LambdaLR(optimizer, partial(learning_rate_factor, ends=tuple(ends), warmup=warmup))
    return {"scheduler": scheduler, "interval": "step", "name": "learning_rate"}
