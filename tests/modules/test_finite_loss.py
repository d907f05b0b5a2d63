from __future__ import annotations

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.finite_loss import FiniteLossGuard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_step_is_named(bad):
    guard = FiniteLossGuard()
    guard.note(torch.tensor(1.0), 6)
    with pytest.raises(FiftyfoldError, match="at step 7"):
        guard.note(torch.tensor(bad), 7)


def test_an_accelerator_is_asked_now_and_then_and_names_the_first_step():
    class OnAccelerator(torch.Tensor):
        device = torch.device("cuda")

    def remote(value: float) -> torch.Tensor:
        return torch.tensor(value).as_subclass(OnAccelerator)

    guard = FiniteLossGuard()
    for step, value in enumerate([1.0, float("nan"), 1.0, float("inf")]):
        guard.note(remote(value), step)
    with pytest.raises(FiftyfoldError, match="at step 1"):
        guard.check()
    guard.check()
    guard.note(remote(float("nan")), 4)
    for step in range(5, 53):
        guard.note(remote(1.0), step)
    with pytest.raises(FiftyfoldError, match="at step 4"):
        guard.note(remote(1.0), 53)
