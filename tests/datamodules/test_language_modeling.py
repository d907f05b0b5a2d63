"""Text for language models: packing, masks, cache, resume, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from fiftyfold.datamodules import LanguageModelingDataModule, packed_text
from fiftyfold.datamodules.packed_text import PackedSequences, _pieces
from fiftyfold.errors import FiftyfoldError
from tests.text import write_text, write_word_tokenizer


@pytest.fixture
def words(tmp_path):
    return write_word_tokenizer(tmp_path / "tokenizer")


def module(tokenizer, data, tmp_path, **options):
    options = {"sequence_length": 8, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **options}
    return LanguageModelingDataModule(str(tokenizer), str(data), **options)


def test_documents_are_joined_and_cut(tmp_path, words):
    file = tmp_path / "stories.txt"
    file.write_text("w1 w2 w3\n<|endoftext|>\nw4\n<|endoftext|>\n\n<|endoftext|>w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15")
    data = module(words, file, tmp_path, sequence_length=4)
    ids = data.tokenizer.convert_tokens_to_ids
    assert [len(document) for document in data.documents("train")] == [3, 1, 11], "the empty one is left out"
    row = data.row("train").tolist()
    assert row[:8] == ids(["<s>", "w1", "w2", "w3", "<s>", "w4", "<s>", "w5"])
    data.setup("fit")
    assert len(data.val_dataloader()) == 1, "one of four sequences is held out"
    batches = list(data.train_dataloader())
    assert [list(batch["input_ids"].shape) for batch in batches] == [[2, 4], [1, 4]]
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)
    seen = torch.cat([batch["input_ids"] for batch in batches])
    assert sorted(seen.tolist()) == sorted(torch.tensor(row[:12]).view(3, 4).tolist())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_records_are_documents(tmp_path, words, form):
    texts = ["w1 w2", "w3 <|endoftext|> w4"]
    file = tmp_path / f"train.{form}"
    if form == "jsonl":
        file.write_text("\n".join(json.dumps({"story": text}) for text in texts) + "\n\n")
    else:
        import datasets

        datasets.Dataset.from_dict({"story": texts}).to_parquet(str(file))
    data = module(words, tmp_path if form == "jsonl" else file, tmp_path, text_column="story")
    assert [len(document) for document in data.documents("train")] == [2, 3]


def test_masks_depend_on_seed_and_epoch_alone(tmp_path):
    words = write_word_tokenizer(tmp_path / "tokenizer", kind="masked")
    write_text(tmp_path / "data", documents=6)
    data = module(words, tmp_path / "data", tmp_path, objective="masked", sequence_length=12)
    data.setup("fit")
    tokenizer, loader = data.tokenizer, data.train_dataloader()
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, list(data.train_dataloader()), strict=True)
    )
    originals = [torch.where(b["labels"] != -100, b["labels"], b["input_ids"]) for b in (*first, *second)]
    half = len(first)
    rows = [sorted(torch.cat(part).tolist()) for part in (originals[:half], originals[half:])]
    assert rows[0] == rows[1], "the same text under both masks"
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))
    for batch in (*first, *second):
        hidden = batch["labels"] != -100
        assert set(hidden.sum(1).tolist()) <= {1, 2}, "15 % of at most 10 words"
        assert bool((batch["input_ids"][:, 0] == tokenizer.cls_token_id).all())
        assert bool((batch["input_ids"][:, -1] == tokenizer.sep_token_id).all())
        assert not bool(torch.isin(batch["labels"][hidden], torch.tensor(tokenizer.all_special_ids)).any())


def test_the_cache_notices_changes(tmp_path, words, monkeypatch):
    folder = write_text(tmp_path / "data")
    calls = []
    original = packed_text._tokenize
    monkeypatch.setattr(packed_text, "_tokenize", lambda *args: calls.append(1) or original(*args))
    module(words, folder, tmp_path).row("train")
    module(words, folder, tmp_path, sequence_length=5).row("train")
    assert len(calls) == 1
    file = folder / "train.txt"
    file.write_text(file.read_text() + " w1")
    assert (
        module(words, folder, tmp_path).row("train")[-1]
        == module(words, folder, tmp_path).tokenizer("w1").input_ids[-1]
    )
    module(write_word_tokenizer(tmp_path / "other", size=30), folder, tmp_path).row("train")
    assert len(calls) == 3


def test_mid_epoch_resume(tmp_path, words):
    data = module(words, write_text(tmp_path / "data"), tmp_path)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.set_epoch(3)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert [b["input_ids"].tolist() for b in again] == [b["input_ids"].tolist() for b in batches]
    shorter = module(words, tmp_path / "data", tmp_path, sequence_length=9)
    shorter.setup("fit")
    with pytest.raises(FiftyfoldError, match="sequence_length"):
        shorter.train_dataloader().load_state_dict(state)


def test_limit_train_takes_a_part(tmp_path, words):
    data = module(words, write_text(tmp_path / "data"), tmp_path, limit_train=3)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: (place / "train.txt").write_text(" \n\n"), "holds no text|less than one sequence"),
        (lambda place: (place / "train.txt").write_text("w1 w2"), "less than one sequence"),
        (lambda place: (place / "train.txt").write_bytes(b"\xff\xfe\x00"), "not UTF-8"),
        (lambda place: (place / "train.jsonl").write_text('{"text": 3}\n'), "is int, not a string"),
        (lambda place: (place / "train.jsonl").write_text('{"story": "a"}\n'), "no 'text'"),
        (lambda place: (place / "train.jsonl").write_text("{\n"), "line 1"),
        (lambda place: (place / "train.parquet").write_text("no"), "no parquet"),
        (lambda place: (place / "notes.md").write_text("w1"), "holds no text"),
        (lambda place: write_text(place).joinpath("train.txt").unlink(), "no training text"),
    ],
)
def test_bad_text_is_refused(tmp_path, words, make, message):
    place = tmp_path / "data"
    place.mkdir()
    make(place)
    with pytest.raises(FiftyfoldError, match=message):
        module(words, place, tmp_path).setup("fit")


def test_bad_arguments_are_refused(tmp_path, words):
    folder = write_text(tmp_path / "data")
    with pytest.raises(FiftyfoldError, match="no mask token"):
        module(words, folder, tmp_path, objective="masked").setup("fit")
    with pytest.raises(FiftyfoldError, match="mask_share"):
        module(words, folder, tmp_path, mask_share=0)
    with pytest.raises(FiftyfoldError, match="no text at"):
        module(words, tmp_path / "absent.txt", tmp_path).setup("fit")
    with pytest.raises(FiftyfoldError, match="no room"):
        PackedSequences(data_tokens(), 2, [1], [2])


def data_tokens():
    import numpy as np

    return np.arange(4, dtype=np.int32)


def test_long_documents_are_cut_after_lines(monkeypatch):
    monkeypatch.setattr(packed_text, "_LONGEST_PIECE", 10)
    text = "abc\ndefg\nhij\n" + "x" * 25 + "\nend"
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 10
    assert pieces[0] == "abc\ndefg\n"


def test_without_a_test_text_it_is_the_validation_text_and_said(tmp_path, words):
    folder = write_text(tmp_path / "data")
    (folder / "test.txt").unlink()
    data = module(words, folder, tmp_path)
    data.setup("test")
    with pytest.warns(UserWarning, match="the test scores the validation text"):
        assert len(data.test_dataloader()) == len(data.val_dataloader())


def test_stages_may_follow_each_other_in_any_order(tmp_path, words):
    folder = write_text(tmp_path / "data")
    alone = {stage: module(words, folder, tmp_path) for stage in ("fit", "test")}
    for stage, data in alone.items():
        data.setup(stage)
    expected = [batch["input_ids"].tolist() for batch in alone["test"].test_dataloader()]
    assert expected != [batch["input_ids"].tolist() for batch in alone["fit"].val_dataloader()]
    for order in (("fit", "test"), ("validate", "fit", "test"), ("test", "validate", "fit")):
        data = module(words, folder, tmp_path)
        for stage in order:
            data.setup(stage)
        assert [batch["input_ids"].tolist() for batch in data.test_dataloader()] == expected
        assert len(data.train_dataloader()) == len(alone["fit"].train_dataloader())
        assert len(data.val_dataloader()) == len(alone["fit"].val_dataloader())


def test_without_validation_text_a_part_of_the_training_text_is_held_out_at_every_stage(tmp_path, words):
    folder = write_text(tmp_path / "data")
    (folder / "valid.txt").unlink()
    data, again = module(words, folder, tmp_path), module(words, folder, tmp_path)
    data.setup("validate")
    again.setup("fit")
    assert len(data.val_dataloader()) == len(again.val_dataloader()) == 1
    (folder / "train.txt").unlink()
    with pytest.raises(FiftyfoldError, match="no train text, only test"):
        module(words, folder, tmp_path).setup("validate")


def test_a_split_can_be_read_in_whole(tmp_path, words):
    data = module(words, write_text(tmp_path / "data"), tmp_path)
    whole = torch.cat([batch["input_ids"] for batch in data.whole_loader("train")])
    assert torch.equal(whole.flatten(), data.row("train")[: whole.numel()])
    assert sum(len(batch["input_ids"]) for batch in data.whole_loader("train", most=17)) == 2


def test_two_files_for_one_split_are_refused(tmp_path, words):
    folder = write_text(tmp_path / "data")
    (folder / "dev.jsonl").write_text('{"text": "w1 w2"}\n')
    with pytest.raises(FiftyfoldError, match=r"valid\.txt and dev\.jsonl"):
        module(words, folder, tmp_path).setup("fit")
