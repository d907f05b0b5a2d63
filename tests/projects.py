"""LightningModules as other projects write them: each of another kind, and none that knows of fiftyfold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.strangers import _Stranger
from tests.tiny import tiny_causal


class _Seeded(_Stranger, ABC):
    """Builds its layers from a seed, and scores itself on batches that depend on their index alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the layers."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> torch.Tensor:
        """Return the loss of a batch that the generator draws."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(torch.Generator().manual_seed(self.seed_of(batch_idx)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(torch.Generator().manual_seed(batch_idx)), prog_bar=False)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate(x.mean(dim=(2, 3))))[:, :, None, None]
        return x + gate * F.relu(self.norm(self.conv(x)))


class Vision(_Seeded):
    """Convolutions, batch normalization, and linear layers between them."""

    def build(self) -> None:
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(8) for _ in range(4))
        self.head = nn.Linear(8, 5)
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        images = torch.randn(4, 3, 8, 8, generator=generator)
        return F.cross_entropy(self(images), torch.randint(5, (4,), generator=generator))


class Recommender(_Seeded):
    """Scores items by the rows with which it looks up the history: embedding and output share one weight."""

    def build(self) -> None:
        self.items = nn.Embedding(30, 16, padding_idx=0)
        self.tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.scores = nn.Linear(16, 30, bias=False)
        self.scores.weight = self.items.weight

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        return self.scores(self.tower(self.items(history).mean(dim=1)))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        history = torch.randint(30, (4, 6), generator=generator)
        return F.cross_entropy(self(history), torch.randint(1, 30, (4,), generator=generator))


class GPT2(_Seeded):
    """A language model of transformers, whose layers are Conv1D."""

    def build(self) -> None:
        self.lm = tiny_causal("gpt2", hidden=16, vocab=40).train()
        for module in self.lm.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in self.lm.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(3, 40, (4, 10), generator=generator)
        return self.lm(input_ids=tokens, labels=tokens).loss


class Adversaries(_Seeded):
    """Two networks with an optimizer each, stepped by hand, in turns."""

    def build(self) -> None:
        self.automatic_optimization = False
        self.maker = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.judge = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.judge(self.maker(noise))

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        return F.softplus(-self(torch.randn(4, 4, generator=generator))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        generator = torch.Generator().manual_seed(self.seed_of(batch_idx))
        makers, judges = self.optimizers()
        if batch_idx % 2:
            real = torch.randn(4, 8, generator=generator)
            fake = self.maker(torch.randn(4, 4, generator=generator)).detach()
            self._step(judges, F.softplus(-self.judge(real)).mean() + F.softplus(self.judge(fake)).mean())
        else:
            self._step(makers, self.loss(generator))

    def _step(self, optimizer: Any, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.maker, self.judge)]


class Regression(_Seeded):
    """The plainest one; the tests compile it whole."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def loss(self, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 6, generator=generator)
        return F.mse_loss(self(x), x.sum(dim=1, keepdim=True))

    def train_dataloader(self) -> DataLoader:
        """Its loss is compiled whole, so that its data must come from outside."""
        drawn = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(drawn), batch_size=1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return F.mse_loss(self(batch[0]), batch[0].sum(dim=1, keepdim=True))


PROJECTS: tuple[type[_Seeded], ...] = (Vision, Recommender, GPT2, Adversaries, Regression)

INPUTS: dict[str, Any] = {
    "Vision": lambda: (torch.randn(2, 3, 8, 8),),
    "Recommender": lambda: (torch.randint(30, (2, 6)),),
    "Adversaries": lambda: (torch.randn(2, 4),),
    "Regression": lambda: (torch.randn(2, 6),),
}
"""What the modules that are not transformers' are called with."""
