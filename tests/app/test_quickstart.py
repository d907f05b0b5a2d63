from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from fiftyfold.app import quickstart as command
from fiftyfold.app.main import main
from fiftyfold.app.quickstart_task import BLAME, PRAISE, distinct_sentences, vocabulary, write_task


def test_the_task_is_a_function_of_its_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_task(tmp_path / name, train_rows=50, dev_rows=20, seed=seed)
    a, b, c = ((tmp_path / name / "SST-2" / "train.tsv").read_bytes() for name in "abc")
    assert a == b != c


def test_no_sentence_is_in_both_splits_and_labels_are_even(tmp_path: Path) -> None:
    write_task(tmp_path, train_rows=2000, dev_rows=500, seed=0)
    splits = [(tmp_path / "SST-2" / f"{name}.tsv").read_text().splitlines()[1:] for name in ("train", "dev")]
    train, dev = ({line.split("\t")[0] for line in split} for split in splits)
    assert len(train) == 2000
    assert not train & dev
    assert 0.45 < sum(line.endswith("\t1") for line in splits[0]) / 2000 < 0.55


def test_every_word_is_in_the_vocabulary() -> None:
    words = {word for text, _ in islice(distinct_sentences(random.Random(0)), 2000) for word in text.split()}
    assert words <= set(vocabulary())


def test_counting_praise_and_blame_does_not_solve_the_task() -> None:
    rows = list(islice(distinct_sentences(random.Random(0)), 4000))
    balance = [sum((word in PRAISE) - (word in BLAME) for word in text.split()) for text, _ in rows]
    right = sum((count > 0) == bool(label) for count, (_, label) in zip(balance, rows, strict=True))
    assert right / len(rows) < 0.75


def test_quickstart_ends_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"TRAIN_ROWS": 64, "DEV_ROWS": 32, "TEACHER_EPOCHS": 1, "STUDENT_EPOCHS": 1}.items():
        monkeypatch.setattr(command, name, value)
    assert main(["quickstart"]) == 0
    report = json.loads((tmp_path / "quickstart-1" / "student" / "fiftyfold_report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["teacher", "untrained", "cut, not trained", "student W1A8"]
    assert "student W1A8" in capsys.readouterr().out
    assert main(["quickstart"]) == 0
    assert (tmp_path / "quickstart-2" / "student" / "model.safetensors").is_file()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["quickstart", "--output", str(tmp_path)]) == 1
    assert "already holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
