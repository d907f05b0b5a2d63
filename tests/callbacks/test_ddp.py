"""Two processes that see different data stay one model through every operation."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fiftyfold.modules.structure import replaying
from fiftyfold.modules.surgery import parameter_checksum
from tests.cases import CASES
from tests.strangers import STEPS, OddUser, assert_same_tensors, make_trainer


class _EqualRanks(Callback):
    """After each step the ranks hold the same weights, though their gradients came from different data."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        sums = trainer.strategy.all_gather(parameter_checksum(pl_module))
        assert trainer.world_size == len(sums) == 2
        assert torch.equal(sums[0], sums[1]), f"the ranks differ at step {trainer.global_step}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_two_ranks(tmp_path):
    def fit(seed, folder, ckpt_path=None):
        module = OddUser(seed)
        trainer = make_trainer(
            [*CASES[-1].callbacks(), _EqualRanks()],
            folder,
            strategy="ddp_fork",
            devices=2,
            use_distributed_sampler=False,
        )
        with replaying():
            trainer.fit(module, ckpt_path=ckpt_path)
        return module

    module = fit(0, tmp_path)
    assert len(module.net.layers) == 2, "the process that called fit has the compressed model"
    for step in (2, 4, 6):
        again = tmp_path / f"from {step}"
        fit(1, again, tmp_path / f"step={step}.ckpt")
        for later in range(step + 1, STEPS + 1):
            whole, resumed = (torch.load(folder / f"step={later}.ckpt") for folder in (tmp_path, again))
            assert_same_tensors(whole["state_dict"], resumed["state_dict"], f"step {later}, resumed from {step}")
            assert_same_moments(whole["optimizer_states"], resumed["optimizer_states"], f"step {later}")


def assert_same_moments(first, second, where):
    for one, other in zip(first, second, strict=True):
        assert one["state"].keys() == other["state"].keys(), where
        for position, moments in one["state"].items():
            assert_same_tensors(moments, other["state"][position], where)
