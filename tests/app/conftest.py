"""A teacher and its task, small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fiftyfold.app.quickstart_task import vocabulary, write_task


def write_teacher(folder: Path, *, labels: int = 2, layers: int = 4) -> None:
    words = vocabulary()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=labels,
    )
    torch.manual_seed(3)
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``teacher`` and ``data``, the current directory and cache of the test."""
    write_teacher(tmp_path / "teacher")
    write_task(tmp_path / "data", train_rows=128, dev_rows=32, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
