from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.learning_rate import learning_rate_factor, linear_schedule, stage_at, stage_ends


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(schedule, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.0), (20, 0.1), (37, 0.25), (1, 0.1), (3, 0.9)])
def test_one_stage_is_transformers_schedule(steps, warmup):
    mine = linear_schedule(optimizer(), [steps], warmup)["scheduler"]
    theirs = get_linear_schedule_with_warmup(optimizer(), round(warmup * steps), steps)
    assert rates(mine, steps + 3) == pytest.approx(rates(theirs, steps + 3))


def test_every_stage_begins_anew():
    ends = stage_ends([1, 1], 20)
    factors = [learning_rate_factor(step, ends, 0.2) for step in range(20)]
    assert factors[:10] == factors[10:]
    assert factors[:3] == [0.0, 0.5, 1.0]


# The smallest stage has more than one step: 0.1 of 40.1 shares of 500. One of less may be rounded away, and is refused.
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(500, 100_000))
def test_stages_divide_the_steps_in_proportion(shares, total):
    ends = stage_ends(shares, total)
    assert ends[-1] == total
    for share, start, end in zip(shares, [0, *ends], ends, strict=False):
        assert abs((end - start) - total * share / sum(shares)) <= 1


def test_the_boundary_belongs_to_the_next_stage():
    assert [stage_at(step, [3, 5]) for step in range(7)] == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("shares", [[], [1, 0], [1, -1]])
def test_a_stage_without_a_share_is_refused(shares):
    with pytest.raises(FiftyfoldError, match="positive share"):
        stage_ends(shares, 10)


def test_too_few_steps_are_refused():
    with pytest.raises(FiftyfoldError, match="train longer"):
        stage_ends([1, 1, 1], 2)


def test_the_schedule_leaves_no_length_in_the_checkpoint():
    state = linear_schedule(optimizer(), [7, 77], 0.1)["scheduler"].state_dict()
    assert "77" not in repr(state)
