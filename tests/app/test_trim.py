"""``fiftyfold trim`` and ``fiftyfold compress --vocabulary texts``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fiftyfold.app import road, training
from fiftyfold.app.last_checkpoint import LastCheckpoint
from fiftyfold.app.main import main
from fiftyfold.modules import export, quantize
from tests.text import tiny_language_model, write_text, write_word_tokenizer

COMMAND = ["compress", "teacher", "--task", "sst2", "--data", "data", "--epochs", "1", "--layers", "first"]
COMMAND += ["--keep", "1", "--vocabulary", "texts", "--output"]


@pytest.fixture
def few_words(place: Path) -> Path:
    """A training set whose few words leave the teacher's tokenizer more that the development set needs."""
    (place / "data" / "SST-2" / "train.tsv").write_text(
        "sentence\tlabel\n" + "the film was good .\t1\nthe film was boring .\t0\n" * 16
    )
    return place


@pytest.fixture
def language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    (tmp_path / "text" / "test.txt").write_text("w45 w46")
    tiny_language_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    write_word_tokenizer(tmp_path / "model")
    return tmp_path


def test_a_language_model_keeps_its_precision_and_predicts_what_is_left(
    language_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trim", "model", "small", "--data", "text"]) == 0
    # Three special tokens and the words of the training text; those of the test text are not looked at.
    words = {*(language_model / "text" / "train.txt").read_text().replace("<|endoftext|>", "").split()}
    assert f"small: {3 + len(words)} of 50 tokens" in capsys.readouterr().out
    small, whole = AutoModelForCausalLM.from_pretrained("small"), AutoModelForCausalLM.from_pretrained("model")
    assert small.dtype == torch.bfloat16
    assert small.config.architectures == whole.config.architectures
    numbers, all_numbers = (AutoTokenizer.from_pretrained(name).get_vocab() for name in ("small", "model"))
    tokens, same_tokens = (
        torch.tensor([[among[f"w{word}"] for word in (1, 4, 13)]]) for among in (numbers, all_numbers)
    )
    kept = [all_numbers[name] for name in sorted(numbers, key=numbers.__getitem__)]
    with torch.no_grad():
        assert torch.allclose(small(tokens).logits, whole(same_tokens).logits[..., kept], atol=0.02)
    assert main(["evaluate", "small", "--data", "text/train.txt"]) == 0


def test_a_classifier_is_trimmed_to_its_tasks_texts(few_words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trim", "teacher", "alone", "--task", "sst2", "--data", "data"]) == 0
    (few_words / "more.jsonl").write_text('{"sentence": "never wonderful"}\n')
    assert main(["trim", "teacher", "more", "--task", "sst2", "--data", "data", "--unlabelled", "more.jsonl"]) == 0
    models = [AutoModelForSequenceClassification.from_pretrained(name) for name in ("alone", "more", "teacher")]
    sizes = [model.config.vocab_size for model in models]
    assert sizes == sorted({*sizes})
    assert f"alone: {sizes[0]} of {sizes[2]} tokens" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained("more").tokenize("never wonderful") == ["never", "wonderful"]
    with torch.no_grad():
        for text in ("the film was good .", "the film was boring ."):
            each = []
            for name, model in zip(("alone", "more", "teacher"), models, strict=True):
                each.append(model(**AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")).logits)
            assert torch.allclose(each[0], each[2], atol=1e-6)
            assert torch.allclose(each[1], each[2], atol=1e-6)


def spoil(change: str) -> None:
    model = Path("model")
    if change == "packed":
        packed = tiny_language_model()
        quantize(packed)
        shutil.rmtree(model)
        export(packed, model, tokenizer=AutoTokenizer.from_pretrained(write_word_tokenizer(Path("words"))))
        return
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = json.loads(change)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--data"),
        (["--data", "text", "--unlabelled", "more.jsonl"], "--task"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "only_test"], "only_test has no training text"),
        (["--data", "text", "--task", "sst3"], "sst3"),
        (["--data", "text", "--output", "text"], "text already holds something"),
        (["--data", "text", "--model", "nobody"], "nobody"),
        ("packed", "model is compressed already"),
        ("null", "architectures"),
        ('["NoSuchModel"]', "architectures"),
        ('["logging"]', "architectures"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    language_model: Path, capsys: pytest.CaptureFixture[str], options: list[str] | str, named: str
) -> None:
    (language_model / "only_test").mkdir()
    (language_model / "only_test" / "test.txt").write_text("w1")
    if isinstance(options, str):
        spoil(options)
        options = ["--data", "text"]
    before = sorted(path.name for path in language_model.iterdir())
    arguments = {"--model": "model", "--output": "small"} | dict(zip(options[::2], options[1::2], strict=True))
    assert main(["trim", arguments.pop("--model"), arguments.pop("--output"), *sum(arguments.items(), ())]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fiftyfold: error: ")
    assert named in error
    assert sorted(path.name for path in language_model.iterdir()) == before


def test_a_student_reads_fewer_tokens_and_its_teacher_all_of_them(
    few_words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    score = road.score

    def recorded(module, data):
        read.append((module.trained_model.config.vocab_size, len(data.tokenizer)))
        return score(module, data)

    monkeypatch.setattr(road, "score", recorded)
    assert main([*COMMAND, "small"]) == 0
    report = json.loads((few_words / "small" / "fiftyfold_report.json").read_text())
    student = AutoModelForSequenceClassification.from_pretrained("small")
    tokenizer, whole = AutoTokenizer.from_pretrained("small"), AutoTokenizer.from_pretrained("teacher")
    fewer, all_of_them = len(tokenizer), len(whole)
    assert student.config.vocab_size == fewer < all_of_them
    # The teacher with fewer tokens, the student, the teacher as it was, and the student reloaded.
    assert sorted(read) == sorted([(fewer, fewer)] * 3 + [(all_of_them, all_of_them)])
    teacher, trimmed, _ = report["rows"]
    assert trimmed["model"] == "fewer tokens"
    assert teacher["parameters"] - trimmed["parameters"] == 32 * (all_of_them - fewer)
    assert report["run"]["recipe"]["vocabulary"] == "texts"
    assert main(["report", "small"]) == 0


def test_an_interrupted_run_goes_on_to_the_same_bytes(few_words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_STEPS", 1)
    command = [*COMMAND[:6], "--batch_size", "8", *COMMAND[6:]]
    assert main([*command, "whole"]) == 0
    save = LastCheckpoint._save

    def interrupted(self, trainer):
        save(self, trainer)
        if trainer.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "_save", interrupted)
        assert main([*command, "small"]) == 130
    assert (few_words / "small.work" / "last.ckpt").exists()
    assert main([*command, "small"]) == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (few_words / "small" / name).read_bytes() == (few_words / "whole" / name).read_bytes()
