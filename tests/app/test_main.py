from __future__ import annotations

from pathlib import Path

import pytest

import fiftyfold
from fiftyfold.app.main import TRAINER_COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("quickstart", "compress", "augment", "export", "report", "benchmark", *TRAINER_COMMANDS):
        assert f"\n  {name} " in printed


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fiftyfold.__version__


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["squash"]) == 1
    assert "'squash'" in capsys.readouterr().err


def test_an_unknown_option_stops_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "teacher", "--task", "sst2", "--colour", "red"]) == 2
    assert "colour" in capsys.readouterr().err


def test_ctrl_c_ends_with_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fiftyfold.app.main._dispatch", interrupted)
    assert main(["quickstart"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("fiftyfold.app.main._dispatch", broken)
    with pytest.raises(ZeroDivisionError):
        main(["quickstart"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--model.teacher", "nobody"], "the teacher 'nobody'"),
        (["--model.layers", "[0,9]"], "there is no layer 9"),
        (["--data.task", "sst3"], "'sst3'"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt; check its name."),
        (["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.start=tomorrow"], "'tomorrow'"),
    ],
)
def test_what_a_class_of_a_recipe_refuses_is_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    module = ["--model", "DistillationModule", "--model.teacher", "teacher"]
    data = ["--data", "GLUEDataModule", "--data.task", "sst2", "--data.data", "data", "--data.tokenizer", "teacher"]
    assert main(["fit", *module, *data, *change]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fiftyfold: error: ")
    assert named in error
