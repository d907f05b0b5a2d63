from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import fiftyfold
from fiftyfold.app.main import main
from fiftyfold.app.trainer_cli import RECIPES, parse_trainer_command
from fiftyfold.callbacks.random_states import CHECKPOINT_KEY

XTC_RECIPES = sorted((RECIPES / "xtc").glob("*.yaml"))


def fit(place: Path, *words: str) -> int:
    logger = ["--trainer.logger", "false", "--trainer.default_root_dir", str(place), "--trainer.max_epochs", "1"]
    module = ["--model", "DistillationModule", "--model.teacher", "teacher", "--model.layers", "every-other"]
    data = ["--data", "GLUEDataModule", "--data.task", "sst2", "--data.data", "data", "--data.tokenizer", "teacher"]
    callbacks = ["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.weight_bits=1"]
    return main(["fit", *module, *data, *callbacks, *logger, *words])


def only_checkpoint(place: Path) -> Path:
    (found,) = place.rglob("*.ckpt")
    return found


def only_checkpoint_folder(place: Path) -> Path:
    (folder,) = {path.parent for path in place.rglob("best.ckpt")}
    return folder


def test_fit_then_export_gives_a_folder_that_loads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(place) == 0
    assert main(["export", str(only_checkpoint(place)), "packed"]) == 0
    assert fiftyfold.load(place / "packed").config.num_hidden_layers == 2
    assert '"ratio"' in capsys.readouterr().out


def test_what_is_typed_wins_over_what_the_checkpoint_remembers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(place, "--model.temperature", "2") == 0
    checkpoint = only_checkpoint(place)
    seen: list[float] = []
    from fiftyfold.modules import DistillationModule

    original = DistillationModule.on_fit_start if hasattr(DistillationModule, "on_fit_start") else None

    def note(module: DistillationModule) -> None:
        seen.append(module._temperature)
        if original is not None:
            original(module)

    monkeypatch.setattr(DistillationModule, "on_fit_start", note)
    resumed = ["--ckpt_path", str(checkpoint), "--trainer.max_epochs", "2"]
    assert fit(place, "--model.temperature", "3", *resumed) == 0
    assert fit(place, *resumed) == 0
    assert seen == [3.0, 2.0]


def test_the_students_checkpoint_holds_no_teacher(place: Path) -> None:
    assert fit(place) == 0
    state = torch.load(only_checkpoint(place), weights_only=True)["state_dict"]
    assert state
    assert not any("teacher" in key for key in state)


def test_checkpoints_hold_random_states_unasked(place: Path) -> None:
    assert fit(place) == 0
    assert len(torch.load(only_checkpoint(place), weights_only=True)[CHECKPOINT_KEY]) == 1


def test_an_unknown_key_stops_with_status_2(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(place, "--model.temperatur", "2") == 2
    assert "temperatur" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", XTC_RECIPES, ids=[path.stem for path in XTC_RECIPES])
def test_every_recipe_runs(recipe: Path, place: Path) -> None:
    """With a teacher of twelve layers in the current directory, on the place's data, for six steps."""
    from tests.app.conftest import write_teacher

    write_teacher(place / "teacher12", layers=12)
    content = yaml.safe_load(recipe.read_text())
    arguments = content["model"]["init_args"]
    name = "model" if "model" in arguments else "teacher"
    words = [
        f"--model.{name}",
        "teacher12",
        "--data.tokenizer",
        "teacher12",
        "--data.data",
        "data",
        "--data.batch_size",
        "16",
    ]
    if "student" in arguments:
        from fiftyfold.modules.fine_tuning import load_classifier
        from fiftyfold.modules.layer_reduction import student_from_teacher

        student_from_teacher(load_classifier("teacher12", "teacher"), [1, 3, 5, 7, 9, 11]).save_pretrained("student")
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1"]
    assert main(["fit", "--config", f"xtc/{recipe.stem}", *words, *limits, "--trainer.default_root_dir", "runs"]) == 0
    assert only_checkpoint_folder(place) == place / "runs" / "lightning_logs" / "version_0" / "checkpoints"


def test_a_trainers_file_does_not_take_a_recipes_compression_away(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "xtc/w1a8", "--trainer", "trainer/many_nodes"]
    assert main(words) == 1
    assert "names QuantizationAwareTraining, but the list of callbacks" in capsys.readouterr().err
    again = ["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.weight_bits=1"]
    trainer = parse_trainer_command([*words, *again]).fit.trainer
    assert trainer.num_nodes == 2
    assert trainer.callbacks[-1].class_path.endswith(".QuantizationAwareTraining")
    assert trainer.callbacks[-1].init_args.weight_bits == 1
    folders = [callback.init_args.get("dirpath") for callback in trainer.callbacks if callback.get("init_args")]
    assert "checkpoints" in folders
