"""Text and tokenizers for the tests of language models, a word a token."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import POSITIONS, tiny_causal

SIZE = 50


def write_word_tokenizer(folder: Path, *, kind: str = "causal", size: int = SIZE) -> Path:
    special = ["<pad>", "<s>", "</s>"] if kind == "causal" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{index}" for index in range(size - len(special)))]
    unknown = words[2] if kind == "causal" else "[UNK]"
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = (
        {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        if kind == "causal"
        else {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, model_max_length=POSITIONS, **names
    ).save_pretrained(folder)
    return folder


def write_text(folder: Path, *, documents: int = 12, length: int = 15) -> Path:
    """Files train, valid and test; a word follows from the one before it but for a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in (("train", 1), ("valid", 2), ("test", 3)):
        generator = random.Random(seed)
        texts = []
        for _ in range(documents):
            word, words = generator.randrange(40), []
            for _ in range(length):
                word = (3 * word + 1) % 40 if generator.random() < 0.9 else generator.randrange(40)
                words.append(f"w{word}")
            texts.append(" ".join(words))
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return folder


def tokens(rows: int = 6, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZE, (rows, length), generator=generator)


def tiny_language_model(kind: str = "llama", **options: int) -> PreTrainedModel:
    return tiny_causal(kind, **{"layers": 2, "hidden": 16, "vocab": SIZE, **options})


def roughened(model: PreTrainedModel, share: float = 0.5) -> PreTrainedModel:
    """A copy whose matrices have lost something, as a compression loses it."""
    import copy

    rough = copy.deepcopy(model).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    for parameter in rough.parameters():
        if parameter.dim() > 1:
            parameter.data += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return rough
