"""Everything at once: distillation with dropout, a resumable loader, and all three methods, resumed bit by bit."""

from __future__ import annotations

import pytest
import torch

from fiftyfold.callbacks import RandomStates
from fiftyfold.datamodules.stateful_loader import StatefulLoader
from fiftyfold.modules import DistillationModule
from fiftyfold.modules.structure import structure_log
from tests.cases import CASES
from tests.strangers import BATCHES, STEPS, assert_same_training, make_trainer
from tests.tiny import tiny_batch, tiny_bert

_ROWS = tiny_batch(rows=4 * BATCHES, vocab=50)


class _Source:
    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, indices):
        return {name: values[indices] for name, values in _ROWS.items()}


def _plan(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return torch.randperm(4 * BATCHES, generator=generator).view(BATCHES, 4).tolist()


def _loader():
    return StatefulLoader(_Source(), _plan, dict, signature={})


@pytest.mark.parametrize("stages", [1, 2])
def test_resume(stages, tmp_path):
    teacher = tiny_bert(layers=8, hidden=16, vocab=50)

    def fit(seed, folder=None, ckpt_path=None):
        torch.manual_seed(seed)
        module = DistillationModule(teacher, layers="every-other", stages=stages)
        trainer = make_trainer([*CASES[-1].callbacks(), RandomStates()], folder)
        trainer.fit(module, _loader(), ckpt_path=ckpt_path)
        return trainer

    whole = fit(0, tmp_path)
    module = whole.lightning_module
    assert [entry["op"] for entry in structure_log(module.student)] == [name for name, _ in CASES[-1].operations]
    assert len(module.kept_layers()) == len(module.student.bert.encoder.layer) == 2
    for step in range(1, STEPS):
        resumed = fit(7, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_training(whole, resumed, f"resumed from step {step}")
