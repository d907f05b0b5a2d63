"""A tiny tokenizer, a tiny GLUE folder, and where the real data lies."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

WORDS = "a good bad film story actor plot very truly fine poor was is the and not run play ##s ##ing ! . , ' 1 2 ?"
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate(special + WORDS.split())}
    backend = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
    # such settings in a tokenizer's file must not show in our batches
    backend.enable_truncation(5)
    backend.enable_padding(length=5)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    generator = random.Random(seed)
    words = [word for word in WORDS.split() if word.isalpha()]
    return [" ".join(generator.choices(words, k=generator.randint(1, longest))) for _ in range(count)]


def write_sst2(folder: Path, train: int = 27, dev: int = 9) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("dev", dev, 2)):
        rows = [f"{text}\t{index % 2}" for index, text in enumerate(sentences(count, seed))]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def sst2_folder(tmp_path) -> Path:
    return write_sst2(tmp_path / "glue" / "SST-2").parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real GLUE files are not beside the project (../shared/data)")
    return SHARED_DATA
