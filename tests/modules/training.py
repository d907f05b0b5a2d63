"""Trainers and data for the tests of LightningModules."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.tiny import tiny_batch


def loader(batches: int = 6, **options: Any) -> DataLoader:
    return DataLoader([tiny_batch(seed, **options) for seed in range(batches)], batch_size=None)


def trainer(**options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**(defaults | options))


def fit(module: LightningModule, *, steps: int = 4, **options: Any) -> Trainer:
    run = trainer(max_steps=steps, max_epochs=-1, **options)
    run.fit(module, loader())
    return run


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
