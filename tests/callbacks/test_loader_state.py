"""A resume in mid-epoch: a loader that cannot find its place is named, once; one that can goes on exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fiftyfold.callbacks import QuantizationAwareTraining, RandomStates
from tests.strangers import BATCHES, STEPS, make_trainer

ROWS = torch.randn(3 * BATCHES, 4, generator=torch.Generator().manual_seed(0))


class Reviews(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> torch.Tensor:
        return ROWS[row]


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(ROWS[torch.randperm(len(ROWS))])


class Remembering:
    """Shuffles each epoch by its number, and tells where it is."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.batch == BATCHES:
            self.epoch, self.batch = self.epoch + 1, 0
        order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(self.epoch)).view(BATCHES, -1)
        while self.batch < BATCHES:
            self.batch += 1
            yield ROWS[order[self.batch - 1]]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def stateful_data_loader() -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(Reviews(), batch_size=3, shuffle=True)


class Learner(LightningModule):
    """Learns from what the loader gives, so that another order gives other weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch), batch.sum(dim=1, keepdim=True))

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    loader: Any, folder: Path | None = None, path: Path | None = None, **options: Any
) -> tuple[list[torch.Tensor], list[str]]:
    """Return the weights, and what was said of the loader. It validates if ``options`` say so."""
    torch.manual_seed(1 if path is None else 2)
    trainer = make_trainer([RandomStates(), QuantizationAwareTraining(start=3)], folder, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Learner(), loader, DataLoader(Reviews(), batch_size=3), ckpt_path=path)
    assert trainer.global_step == STEPS
    weights = [parameter.detach() for parameter in trainer.lightning_module.parameters()]
    return weights, [str(each.message) for each in caught if "keeps no state" in str(each.message)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


FORGETFUL: dict[str, Callable[[], Any]] = {
    "DataLoader of Reviews": lambda: DataLoader(Reviews(), batch_size=3, shuffle=True),
    "DataLoader of Stream": lambda: DataLoader(Stream(), batch_size=3),
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_loader_without_a_state_is_named_once(name, tmp_path):
    make = FORGETFUL[name]
    whole, said = train(make(), tmp_path)
    assert not said, "nothing is lost before a resume"
    resumed, said = train(make(), path=tmp_path / "step=2.ckpt")
    assert len(said) == 1
    assert f"The training loader {name} keeps no state: after 2 batches of its epoch" in said[0]
    assert not equal(whole, resumed), "the warning is true"
    assert not train(make(), path=tmp_path / f"step={BATCHES}.ckpt")[1], "an epoch's end is a place that all can find"


@pytest.mark.parametrize("make", [Remembering, stateful_data_loader])
@pytest.mark.parametrize("step", [2, BATCHES + 1])
def test_a_loader_with_a_state_goes_on_exactly(make, step, tmp_path):
    whole, _ = train(make(), tmp_path)
    resumed, said = train(make(), path=tmp_path / f"step={step}.ckpt")
    assert not said
    assert equal(whole, resumed)


@pytest.mark.parametrize("interval", [1.0, 0.5])
@pytest.mark.parametrize("step", [2, BATCHES])
def test_validation_leaves_the_random_numbers_of_training_alone(step, interval, tmp_path):
    """A run that resumes after an epoch's last batch does not repeat the validation, whose loader draws a seed."""
    options = {"limit_val_batches": 2, "val_check_interval": interval}
    whole, _ = train(Remembering(), tmp_path, **options)
    assert equal(whole, train(Remembering(), path=tmp_path / f"step={step}.ckpt", **options)[0])
    assert equal(whole, train(Remembering())[0]), "a run that validates nothing is the same"


def test_a_validation_that_stopping_brings_leaves_them_alone_too():
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == 3

    states = []
    for batches in (2, 0):
        torch.manual_seed(1)
        trainer = make_trainer([RandomStates(), Stop()], limit_val_batches=batches)
        trainer.fit(Learner(), Remembering(), DataLoader(Reviews(), batch_size=3))
        assert trainer.global_step == 3
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
