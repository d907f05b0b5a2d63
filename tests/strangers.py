"""LightningModules that know nothing of fiftyfold, and how to train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from tests.tiny import tiny_batch, tiny_bert

EPOCHS = 2
BATCHES = 4
STEPS = EPOCHS * BATCHES


class _Stranger(LightningModule):
    """Draws its data from its position in training, so that every resumed run sees what the whole run saw."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(64), batch_size=1)

    val_dataloader = test_dataloader = train_dataloader

    def seed_of(self, batch_idx: int) -> int:
        return 1000 * self.current_epoch + 10 * batch_idx + self.global_rank


class BertUser(_Stranger):
    """A transformers model inside a module that trains it in the plainest way."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny_bert(layers=4, hidden=16, vocab=50, seed=seed).train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(self.seed_of(batch_idx))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self._loss(batch_idx))

    test_step = validation_step

    def _loss(self, seed: int) -> torch.Tensor:
        batch = tiny_batch(seed, vocab=50)
        return self.model(**{name: value.to(self.device) for name, value in batch.items()}).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class _Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(_Residual(width) for _ in range(6))
        self.head = nn.Linear(width, 2)
        self.tied = nn.Linear(width, 20, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1)), self.tied(x)


class OddUser(_Stranger):
    """No transformers model, an alias of the layers, a tied weight, dropped-out groups, one learning rate a layer.

    The groups are in the reverse of the model's order, and those of layers that are dropped become empty.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = _Net(8)
        self.blocks = self.net.layers

    def _loss(self, seed: int) -> torch.Tensor:
        tokens = tiny_batch(seed, vocab=20)["input_ids"].to(self.device)
        logits, words = self.net(tokens)
        label_loss = nn.functional.cross_entropy(logits, tokens[:, 0] % 2)
        return label_loss + nn.functional.cross_entropy(words.flatten(0, 1), tokens.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(self.seed_of(batch_idx))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self._loss(batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        biases = [p for name, p in self.named_parameters() if name.endswith("bias") and ".layers." not in name]
        groups: list[dict[str, Any]] = [{"params": biases[::-1], "weight_decay": 0.0}]
        for depth, layer in reversed(list(enumerate(self.net.layers))):
            groups.append({"params": list(layer.parameters())[::-1], "lr": 1e-2 / (1 + depth)})
        groups.append({"params": [self.net.embed.weight, self.net.head.weight]})
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        rates = [lambda step: 0.9**step, *[lambda step: 1 / (1 + step)] * len(self.net.layers), lambda step: 0.8**step]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


_ROWS = 8


class SplitUser(OddUser):
    """Every rank gets its part of the batch that a single process gets whole."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        del self.blocks

    def _loss(self, seed: int) -> torch.Tensor:
        tokens = torch.randint(20, (_ROWS, 12), generator=torch.Generator().manual_seed(seed))
        parts = self.trainer.world_size
        tokens = tokens[self.global_rank * _ROWS // parts :][: _ROWS // parts]
        logits, words = self.net(tokens)
        label_loss = nn.functional.cross_entropy(logits, tokens[:, 0] % 2)
        return label_loss + nn.functional.cross_entropy(words.flatten(0, 1), tokens.flatten())

    def seed_of(self, batch_idx: int) -> int:
        return 1000 * self.current_epoch + 10 * batch_idx


MODULES: tuple[type[_Stranger], ...] = (BertUser, OddUser)


def make_trainer(callbacks: list[Callback] | None = None, folder: Path | None = None, **options: Any) -> Trainer:
    """A silent Trainer of STEPS steps; with ``folder``, it writes ``step=k.ckpt`` each step, or each ``every``."""
    callbacks = list(callbacks or [])
    if folder is not None:
        weights_only, every = options.pop("weights_only", False), options.pop("every", 1)
        callbacks.append(
            ModelCheckpoint(
                folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_weights_only=weights_only
            )
        )
    options.pop("every", None)
    options = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "limit_train_batches": BATCHES,
        "limit_val_batches": 0,
        "limit_test_batches": 2,
        **options,
    }
    return Trainer(
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


def assert_same_tensors(first: dict[str, Any], second: dict[str, Any], where: str) -> None:
    """Bit by bit, names included."""
    assert list(first) == list(second), where
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{where}: {name}"


def assert_same_training(first: Trainer, second: Trainer, where: str) -> None:
    """Weights, structure, optimizer moments, learning rates and schedules are equal bit by bit."""
    assert_same_tensors(first.lightning_module.state_dict(), second.lightning_module.state_dict(), where)
    for one, other in zip(first.optimizers, second.optimizers, strict=True):
        state, other_state = one.state_dict(), other.state_dict()
        assert _used_groups(state) == _used_groups(other_state), where
        assert len(state["param_groups"]) == len(other_state["param_groups"]), where
        assert state["state"].keys() == other_state["state"].keys(), where
        for position, moments in state["state"].items():
            assert_same_tensors(moments, other_state["state"][position], f"{where}: moments of {position}")
    for one, other in zip(first.lr_scheduler_configs, second.lr_scheduler_configs, strict=True):
        assert one.scheduler.last_epoch == other.scheduler.last_epoch, where
        assert one.scheduler.base_lrs == other.scheduler.base_lrs, where


def _used_groups(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A group whose layer was dropped trains nothing: its learning rate may be anything."""
    return [group for group in state["param_groups"] if group["params"]]
