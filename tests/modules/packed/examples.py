"""What the tests of packed folders have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fiftyfold.kernels.path import use_path
from fiftyfold.modules import quantize
from tests.tiny import tiny_batch


def inputs(seed: int = 3) -> dict[str, torch.Tensor]:
    batch = tiny_batch(seed)
    del batch["labels"]
    return batch


def logits(model: nn.Module, seed: int = 3) -> torch.Tensor:
    """What the model gives on the reference path, in evaluation mode."""
    model.eval()
    with torch.no_grad(), use_path("reference"):
        return model(**inputs(seed)).logits


def quantized(model: PreTrainedModel, **arguments: Any) -> PreTrainedModel:
    """Quantize in place; static ranges observe one batch."""
    quantize(model, **arguments)
    if arguments.get("activation_range") == "static":
        model.train()
        model(**inputs(9))
        model.eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "good", "bad", "film", "the", "was"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, edit: Any) -> None:
    config = read_config(folder)
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Rewrite the weight file with a checksum that fits, as a careful forger would."""
    from fiftyfold.modules.packed.weights_file import write_tensors

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    write_tensors(path, tensors)


def drop_checksum(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})


def edit_header(folder: Path, edit: Any) -> None:
    """Change the header of the weight file and leave the contents."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


class Encoder(nn.Module):
    """A stranger's model: residual blocks in a list, with an embedding and odd widths."""

    def __init__(self, layers: int = 4, width: int = 13) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))
