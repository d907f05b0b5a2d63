from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, pipeline

from fiftyfold.app import road, training
from fiftyfold.app.main import main
from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
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


def test_texts_without_labels_are_trained_on_too(place: Path) -> None:
    rows = (place / "data" / "SST-2" / "train.tsv").read_text().count("\n") - 1
    (place / "more.jsonl").write_text('{"sentence": "the film was not boring ."}\n' * rows)
    made = []
    for folder, options in {"alone": [], "beside": ["--unlabelled", "more.jsonl"]}.items():
        assert main([*COMMAND[:-3], folder, "--epochs", "1", *options]) == 0
        report = json.loads((place / folder / "fiftyfold_report.json").read_text())
        made.append((report["run"]["recipe"]["unlabelled"], digest(place / folder)))
    assert [source for source, _ in made] == [None, "more.jsonl"]
    assert made[0][1] != made[1][1]


def test_the_report_command_prints_the_table_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    capsys.readouterr()
    assert main(["report", "small"]) == 0
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
    end = time.monotonic() + 300  # a machine that is busy otherwise takes minutes to the first step
    while not last.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (place / "small").exists()

    assert main(COMMAND) == 0
    assert digest(place / "small") == digest(place / "whole")


def test_a_run_that_fails_after_its_export_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY_STEPS", 1)
        patch.setattr(road, "measure_latency", interrupted)
        assert main(COMMAND) == 130
    assert not (place / "small").exists()
    assert main(COMMAND) == 0
    assert "rows" in json.loads((place / "small" / "fiftyfold_report.json").read_text())


def test_a_second_run_beside_the_first_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = place / "small.work" / "options.json"
    options.parent.mkdir()
    with sole_writer(options, "small.work"):
        assert main(COMMAND) == 1
    assert "another run" in capsys.readouterr().err
    assert options.read_text() == ""


def test_a_run_that_ends_while_another_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deletes its folder between the other's looking at it and its lock."""
    file = tmp_path / "options.json"
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (file.unlink(), lock(*arguments)))
    with pytest.raises(FiftyfoldError, match="another run"), sole_writer(file, "small.work"):
        pytest.fail("both would write")
    monkeypatch.undo()
    with pytest.raises(FiftyfoldError, match="another run"), sole_writer(tmp_path / "gone" / file.name, "small.work"):
        pytest.fail("there is no folder")


def test_bad_input_is_found_before_the_training(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(road, "train", lambda *_, **__: pytest.fail("it trains"))
    dev = place / "data" / "SST-2" / "dev.tsv"
    good = dev.read_text()
    for bad, named in {"": "is empty", "text\tlabel\na\t1\n": "'sentence'", good + "fine\t2\n": "'2'"}.items():
        dev.write_text(bad)
        assert main(COMMAND) == 1
        assert named in capsys.readouterr().err
    dev.write_text(good)
    write_teacher(place / "three", labels=3)
    assert main(["compress", "three", *COMMAND[2:]]) == 1
    assert "3 label" in capsys.readouterr().err
    assert main([*COMMAND, "--targets", "no_such_module"]) == 1
    assert "no_such_module" in capsys.readouterr().err
    (place / "teacher" / "model.safetensors").write_bytes(b"12345678")
    assert main(COMMAND) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_an_unfinished_run_with_other_options_is_not_overwritten(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "small.work").mkdir()
    (place / "small.work" / "options.json").write_text("{}")
    (place / "small.work" / "last.ckpt").write_bytes(b"")
    assert main(COMMAND) == 1
    assert "other options" in capsys.readouterr().err
    assert (place / "small.work" / "options.json").read_text() == "{}"


@pytest.mark.parametrize("what", ["teacher/model.safetensors", "data/SST-2/train.tsv", "data/SST-2/dev.tsv"])
def test_an_unfinished_run_whose_teacher_or_data_changed_is_refused(
    what: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(road, "deliver", lambda *_, **__: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            main(COMMAND)
    path = place / what
    before = path.read_bytes()
    if path.suffix == ".tsv":
        path.write_bytes(before + b"fine\t1\n")
    else:
        save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert main(COMMAND) == 1
    assert "of a model or text that has changed" in capsys.readouterr().err
    path.write_bytes(before)
    assert main(COMMAND) == 0


def test_a_run_killed_when_its_folder_had_its_name_shows_the_table(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert main(COMMAND) == 0
    table = capsys.readouterr().out
    assert main([*COMMAND, "--warmup", "0.2"]) == 1, "other options"
    capsys.readouterr()
    assert main(COMMAND) == 0
    again = capsys.readouterr().out
    assert "teacher" in again
    assert table.endswith(again)
    assert not (place / "small.work").exists()
    assert main(COMMAND) == 1, "nothing is overwritten"


def test_a_run_that_was_killed_before_it_had_made_anything_leaves_its_folder_to_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_to_train(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(road, "train", begin_to_train)
    (place / "small.work").mkdir()
    (place / "small.work" / "options.json").write_text('{"epochs": 77}')
    assert main(COMMAND) == 130
    assert not (place / "small.work").exists()


def test_an_unfinished_run_of_a_version_with_fewer_options_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(road, "deliver", lambda *_, **__: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        main(COMMAND)
    stamp = place / "small.work" / "options.json"
    options = json.loads(stamp.read_text())
    assert options.pop("dropout") is None
    stamp.write_text(json.dumps(options))
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert main(COMMAND) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--task", "sst3"], "sst3"),
        (["--data", "nowhere"], "nowhere"),
        (["--layers", "[0, 9]"], "9"),
        (["--targets", "no_such_module"], "no_such_module"),
        (["--task", "mrpc"], "mrpc"),
        (["--output", "data"], "already holds something"),
        (["--output", "data/SST-2/dev.tsv/small"], "dev.tsv is read-only, or no folder; name an output folder"),
        (["--augmented", "nothing.jsonl"], "nothing.jsonl"),
        (["--unlabelled", "nothing.jsonl"], "nothing.jsonl"),
        (["--epochs", "0"], "epochs is 0"),
        (["--checks_per_epoch", "0"], "checks_per_epoch is 0"),
        (["--learning_rate", "0"], "learning_rate is 0"),
        (["--keep", "9"], "keep is 9, but layers is all"),
        (["--keep", "9", "--layers", "first"], "cannot keep 9 of 4 layers"),
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


def test_an_output_on_a_read_only_disk_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: not (place == tmp_path and mode == os.W_OK))
    with pytest.raises(FiftyfoldError, match="is read-only, or no folder; name an output folder elsewhere"):
        training.claim_output(tmp_path / "new" / "small")


@pytest.mark.parametrize("output", [".", "./", "../here"])
def test_the_current_directory_is_not_replaced(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    command = ["compress", str(place / "teacher"), "--task", "sst2", "--data", str(place / "data")]
    assert main([*command, "--output", output]) == 1
    assert "current directory" in capsys.readouterr().err
    assert not list(place.glob("*.work"))


def test_a_missing_teacher_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "nobody", *COMMAND[2:]]) == 1
    assert "nobody" in capsys.readouterr().err
