from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from fiftyfold.app import training
from fiftyfold.app.main import main
from tests.app.conftest import write_teacher

COMMAND = ["compress", "teacher", "--task", "sst2", "--data", "data", "--output", "small", "--epochs", "2"]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_teacher_becomes_a_folder_that_transformers_opens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--layers", "every-other"]) == 0

    report = json.loads((place / "small" / "fiftyfold_report.json").read_text())
    teacher, student = report["rows"]
    assert student["bytes_on_disk"] == (place / "small" / "model.safetensors").stat().st_size
    assert teacher["bytes_on_disk"] == (place / "teacher" / "model.safetensors").stat().st_size
    # The reloaded model multiplies in integers, so that a sentence on the border may fall to the other side.
    assert abs(report["scores"]["reloaded"]["val/score"] - report["run"]["trained"]["val/score"]) <= 1 / 32
    assert report["outputs_equal"] is True
    printed = capsys.readouterr().out
    assert "student W1A8" in printed
    assert (place / "small" / "fiftyfold_report.png").stat().st_size > 5000
    model = AutoModelForSequenceClassification.from_pretrained(place / "small")
    assert model.config.num_hidden_layers == 2
    judge = pipeline("text-classification", model=str(place / "small"))
    assert judge("the film was not boring .")[0]["label"] in model.config.label2id
    assert not (place / "small.work").exists()


def test_the_report_command_prints_the_table_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    capsys.readouterr()
    assert main(["report", '["small"]']) == 0
    assert "student W1A8" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_to_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_STEPS", 1)
    assert main([*COMMAND[:-3], "whole", "--epochs", "2"]) == 0

    script = (
        "import sys; from fiftyfold.app import training; training.SAVE_EVERY_STEPS = 1\n"
        "from fiftyfold.app.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", script, *COMMAND]
    process = subprocess.Popen(
        arguments, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    last = place / "small.work" / "last.ckpt"
    for _ in range(1200):
        if last.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (place / "small").exists()

    assert main(COMMAND) == 0
    assert digest(place / "small") == digest(place / "whole")


def test_an_unfinished_run_with_other_options_is_not_overwritten(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "small.work").mkdir()
    (place / "small.work" / "options.json").write_text("{}")
    assert main(COMMAND) == 1
    assert "other options" in capsys.readouterr().err
    assert (place / "small.work" / "options.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--task", "sst3"], "sst3"),
        (["--data", "nowhere"], "nowhere"),
        (["--layers", "[0, 9]"], "9"),
        (["--targets", "no_such_module"], "no_such_module"),
        (["--task", "mrpc"], "mrpc"),
        (["--output", "data"], "already holds something"),
        (["--augmented", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert main([*COMMAND, *change]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fiftyfold: error: ")
    assert named.lower() in error.lower()
    assert not (place / "small").exists()
    assert sorted(path.name for path in place.iterdir() if path.name != "cache") == before


def test_a_missing_teacher_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "nobody", *COMMAND[2:]]) == 1
    assert "nobody" in capsys.readouterr().err


def test_a_teacher_with_other_labels_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(place / "three", labels=3)
    assert main(["compress", "three", *COMMAND[2:]]) == 1
    assert "3 label" in capsys.readouterr().err
