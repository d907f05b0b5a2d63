"""A training that is killed and resumed in mid-epoch is the one that was never interrupted."""

from __future__ import annotations

import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fiftyfold.callbacks.random_states import RandomStates, capture_random_states, restore_random_states
from fiftyfold.datamodules import GLUEDataModule
from tests.datamodules.conftest import write_sst2

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]


class KilledError(Exception):
    """Stands for the process's end."""


class Classifier(pl.LightningModule):
    """Draws from every generator while it trains: dropout from torch's, noise from NumPy's and Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 8)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 2)
        self.seen: list[tuple[int, list[list[int]]]] = []

    def forward(self, batch):
        mask = batch["attention_mask"][..., None]
        return self.head(self.dropout((self.embedding(batch["input_ids"]) * mask).sum(1) / mask.sum(1)))

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, batch["input_ids"].tolist()))
        noise = 1 + 0.1 * np.random.randn() + 0.1 * random.random()
        return noise * torch.nn.functional.cross_entropy(self(batch), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch), batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class KillAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0:
            raise KilledError


def run(folder, tokenizer, tmp_path, *, checkpoint=None, kill_after=None, validate_every=4, **options):
    """27 examples in batches of 4: seven batches an epoch, an odd number for two accumulated ones."""
    pl.seed_everything(7 if checkpoint is None else 99, verbose=False)
    module = Classifier()
    data = GLUEDataModule("sst2", tokenizer, str(folder), batch_size=4, cache_dir=str(tmp_path / "cache"), **options)
    saver = ModelCheckpoint(tmp_path / "saved", "{step}-{epoch}", every_n_train_steps=1, save_top_k=-1)
    validated = ModelCheckpoint(tmp_path / "validated", "{step}-{epoch}", monitor="val/loss", save_top_k=-1)
    ended = ModelCheckpoint(tmp_path / "ended", "{step}-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=2,
        val_check_interval=validate_every,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStates(), saver, validated, ended, *([KillAfter(kill_after)] if kill_after else [])],
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


def assert_same_end(module, expected):
    assert module.seen == expected.seen[-len(module.seen) :] if module.seen else True
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("grouped", [False, True])
def test_every_checkpoint_leads_to_the_same_end(tmp_path, sst2_folder, tokenizer_folder, grouped):
    expected = run(sst2_folder, tokenizer_folder, tmp_path / "whole", group_by_length=grouped)
    assert len(expected.seen) == 21
    checkpoints = sorted((tmp_path / "whole").glob("*/*.ckpt"))
    assert {path.parent.name for path in checkpoints} == {"saved", "validated", "ended"}
    trained = set()
    for number, checkpoint in enumerate(checkpoints):
        module = run(
            sst2_folder, tokenizer_folder, tmp_path / str(number), checkpoint=checkpoint, group_by_length=grouped
        )
        assert_same_end(module, expected)
        trained.add(len(module.seen))
    assert {21 - 4, 21 - 7, 21 - 9} <= trained, "checkpoints in mid-epoch and at an epoch's end were among them"


def test_killed_run_goes_on(tmp_path, sst2_folder, tokenizer_folder):
    expected = run(sst2_folder, tokenizer_folder, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(sst2_folder, tokenizer_folder, tmp_path / "part", kill_after=12)
    latest = max((tmp_path / "part" / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    module = run(sst2_folder, tokenizer_folder, tmp_path / "part", checkpoint=latest)
    assert_same_end(module, expected)
    assert len(module.seen) == 21 - 11


def test_warns_of_checkpoints_without_their_accumulated_gradients(tmp_path, sst2_folder, tokenizer_folder):
    with pytest.warns(UserWarning, match="after 3 batches, between two optimizer steps"):
        run(sst2_folder, tokenizer_folder, tmp_path, validate_every=3)


def test_without_the_callback_dropout_differs(tmp_path, sst2_folder, tokenizer_folder, monkeypatch):
    expected = run(sst2_folder, tokenizer_folder, tmp_path / "whole")
    monkeypatch.setattr(RandomStates, "on_load_checkpoint", Callback.on_load_checkpoint)
    checkpoint = next((tmp_path / "whole" / "saved").glob("step=2-*.ckpt"))
    module = run(sst2_folder, tokenizer_folder, tmp_path / "again", checkpoint=checkpoint)
    assert module.seen == expected.seen[4:]
    assert not torch.equal(module.head.weight, expected.head.weight)


def test_states_survive_a_file_read_without_trust(tmp_path):
    torch.save(capture_random_states(), tmp_path / "states.pt")

    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()

    random.gauss(0, 1)
    np.random.randn()
    torch.save(capture_random_states(), tmp_path / "states.pt")
    first = draw()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == first


def train_on_two_ranks(folder, tokenizer, out, checkpoint=None) -> None:
    """Runs in each of two processes; writes down what its rank saw and drew."""
    pl.seed_everything(7, verbose=False)
    module = Classifier()
    data = GLUEDataModule("sst2", tokenizer, folder, batch_size=4, cache_dir=str(Path(out) / "cache"))
    saver = ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStates(), saver, PerRank(), WriteDown(out)],
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)


class PerRank(Callback):
    """Gives each rank random numbers of its own, as different data would."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            pl.seed_everything(100 + trainer.global_rank, verbose=False)


class WriteDown(Callback):
    def __init__(self, out) -> None:
        self.out = out

    def on_train_end(self, trainer, pl_module):
        name = Path(self.out) / f"rank{trainer.global_rank}.pt"
        torch.save({"seen": pl_module.seen, "next": torch.rand(4), "weight": pl_module.head.weight.detach()}, name)


@pytest.mark.slow
def test_two_ranks_share_the_data_and_resume_with_their_own_random_numbers(tmp_path, tokenizer_folder):
    folder = write_sst2(tmp_path / "glue" / "SST-2", train=27)
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    train_on_two_ranks(str(folder), tokenizer_folder, str(whole))
    expected = [torch.load(whole / f"rank{rank}.pt") for rank in range(2)]
    epochs = [[row for rank in expected for _, batch in rank["seen"][i : i + 4] for row in batch] for i in (0, 4)]
    assert [len(rows) for rows in epochs] == [27, 27]
    assert not torch.equal(expected[0]["next"], expected[1]["next"])
    train_on_two_ranks(str(folder), tokenizer_folder, str(part), str(whole / "step=3.ckpt"))
    for rank in range(2):
        resumed = torch.load(part / f"rank{rank}.pt")
        assert resumed["seen"] == expected[rank]["seen"][3:]
        assert torch.equal(resumed["next"], expected[rank]["next"])
        assert torch.equal(resumed["weight"], expected[rank]["weight"])
