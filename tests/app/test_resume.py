"""Resuming through the command line: the same result, and what is typed wins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from fiftyfold.app.main import main
from fiftyfold.app.trainer_cli import parse_trainer_command
from fiftyfold.modules import DistillationModule, FineTuningModule
from tests.reliability.commands import fit_words, training_hash

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.25}}


@pytest.fixture
def checkpoint(place: Path) -> Path:
    """Of step 2 of 8, in mid-epoch."""
    assert main(fit_words("first", data__limit_train=64, trainer__max_steps=2, model__warmup=0.2)) == 0
    return Path("first/step=2.ckpt")


def model_of(*words: str) -> object:
    config = parse_trainer_command(["fit", "--data", "GLUEDataModule", "--data.task", "sst2", *words])
    return config.fit.model


def edit(checkpoint: Path, **hyper_parameters: object) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= hyper_parameters
    torch.save(content, "edited.ckpt")
    return Path("edited.ckpt")


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("written",)


TYPED = ("--data.tokenizer", "teacher")


def test_the_checkpoint_fills_in_what_is_not_typed(checkpoint):
    model = model_of(*TYPED, "--ckpt_path", str(checkpoint))
    assert model.class_path == "fiftyfold.modules.FineTuningModule"
    assert (model.init_args.model, model.init_args.warmup) == ("teacher", 0.2)


@pytest.mark.parametrize("place_of_path", ["before", "after", "in the recipe"])
def test_what_is_typed_wins(checkpoint, place_of_path):
    path = ["--ckpt_path", str(checkpoint)]
    typed = ["--model", "FineTuningModule", "--model.warmup", "0.4"]
    if place_of_path == "in the recipe":
        Path("resume.yaml").write_text(f"ckpt_path: {checkpoint}\n")
        path = ["--config", "resume.yaml"]
    words = [*path, *typed] if place_of_path == "before" else [*typed, *path]
    model = model_of(*TYPED, *words)
    assert model.init_args.warmup == 0.4
    assert model.init_args.model == "teacher"


def test_a_recipe_counts_as_typed(checkpoint):
    recipe = {"model": {"class_path": "FineTuningModule", "init_args": {"warmup": 0.6, "optimizer": SGD}}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    model = model_of(*TYPED, "--config", "recipe.yaml", "--ckpt_path", str(checkpoint), "--model.weight_decay", "0.5")
    assert (model.init_args.warmup, model.init_args.weight_decay) == (0.6, 0.5)
    assert model.init_args.optimizer.init_args.momentum == 0.25


def test_another_class_takes_nothing_over(checkpoint):
    words = ["--model", "DistillationModule", "--model.teacher", "teacher", "--ckpt_path", str(checkpoint)]
    model = model_of(*TYPED, *words)
    assert model.class_path == "fiftyfold.modules.DistillationModule"
    assert model.init_args.warmup == 0.1


def test_a_new_learning_rate_has_an_effect(checkpoint, monkeypatch):
    """Torch puts the old one back together with the optimizer's moments."""
    seen: dict[str, list[float]] = {}

    def rates(trainer: Trainer) -> None:
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        groups = optimizer.param_groups
        seen["lr"] = [group["lr"] for group in groups]
        seen["decay"] = [group["weight_decay"] for group in groups]
        seen["base"] = list(config.scheduler.base_lrs)

    monkeypatch.setattr(FineTuningModule, "on_train_batch_start", lambda self, *_: rates(self.trainer), raising=False)
    resume = {"resume": checkpoint, "data__limit_train": 64, "trainer__max_steps": 3, "model__warmup": 0.2}
    options = {"model__optimizer": "torch.optim.AdamW", "model__weight_decay": 0.3}
    assert main(fit_words("same", **resume)) == 0
    old = seen["lr"][0], seen["base"][0]
    assert main(fit_words("new", **resume, **options, model__optimizer__lr=7e-3)) == 0
    assert seen["base"] == [7e-3] * len(seen["base"])
    assert seen["lr"][0] == pytest.approx(7e-3 * old[0] / old[1])
    assert set(seen["decay"]) == {0.3, 0.0}


def test_a_resume_in_the_same_folder_is_exact(place):
    assert main(fit_words("whole", data__limit_train=64)) == 0
    expected = training_hash(place / "whole" / "step=8.ckpt")
    assert main(fit_words("part", data__limit_train=64)) == 0
    for step in range(4, 9):
        (place / "part" / f"step={step}.ckpt").unlink()
    assert main(fit_words("part", data__limit_train=64, resume=Path("part/step=3.ckpt"))) == 0
    assert training_hash(place / "part" / "step=8.ckpt") == expected


def test_weights_alone_can_be_scored_but_not_trained_on(place, capsys):
    words = fit_words("light", weights_only=True, data__limit_train=64)
    assert main(words) == 0
    light = Path("light/step=8.ckpt")
    assert main(fit_words("light", data__limit_train=64, resume=light)) == 1
    assert "holds weights alone" in capsys.readouterr().err
    scoring = [word for word in words[1:] if "ModelCheckpoint" not in word]
    cut = next(index for index, word in enumerate(scoring) if "dirpath" in word)
    callbacks = scoring[:cut]
    for command in ("validate", "test", "predict"):
        assert main([command, *callbacks, "--ckpt_path", str(light)]) == 0


def test_a_checkpoint_of_compress_names_its_class_too(place, monkeypatch):
    from fiftyfold.app import road

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(road, "deliver", stop)
    assert (
        main(["compress", "teacher", "--task", "sst2", "--data", "data", "--output", "small", "--epochs", "1"]) == 130
    )
    model = model_of(*TYPED, "--ckpt_path", "small.work/last.ckpt")
    assert model.class_path.endswith(DistillationModule.__qualname__)
    assert model.init_args.teacher == "teacher"


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        ({"_class_path": "antigravity.Module"}, "antigravity.Module, which is not imported"),
        ({"_class_path": "subprocess.Popen"}, "subprocess.Popen, which is not imported"),
        ({"optimizer": "os.system"}, "'os.system', which a checkpoint may not ask for"),
        ({"optimizer": {"class_path": "os.system"}}, "'os.system', which a checkpoint may not ask for"),
        ({"optimizer": {"class_path": "evil.Optimizer"}}, "'evil.Optimizer', which a checkpoint may not ask for"),
        ({"warmup": [{"class_path": "subprocess.Popen", "init_args": {"args": "true"}}]}, "'subprocess.Popen'"),
    ],
)
def test_a_checkpoint_cannot_name_code(checkpoint, hostile, named, capsys):
    Path("evil.py").write_text("raise SystemExit('executed')")
    hostile_path = edit(checkpoint, **hostile)
    assert main(["fit", *TYPED, "--ckpt_path", str(hostile_path)]) == 1
    assert named in capsys.readouterr().err


def test_a_pickle_is_not_executed(place, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"teacher": Evil()}}, "evil.ckpt")
    for words in (["fit", "--ckpt_path", "evil.ckpt"], ["export", "evil.ckpt", "out"]):
        assert main(words) == 1
        assert "it asks for more than tensors and plain values" in capsys.readouterr().err
    assert not Path("written").exists()


def test_a_recipe_that_is_no_text(place, capsys):
    Path("bad.yaml").write_bytes(b"model: \xff\xfe")
    assert main(["fit", "--config", "bad.yaml"]) == 1
    assert "cannot be read" in capsys.readouterr().err
