from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fiftyfold.app import training
from fiftyfold.app.recipe import Recipe
from fiftyfold.app.road import build_callbacks, build_data, build_module


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_at", ["after the save on the epoch's last step", "in mid-epoch"])
def test_a_kill_changes_neither_the_scores_nor_the_best_weights(
    place: Path, kill_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps an epoch, a save every two: the second save of an epoch falls on the step before its validation."""
    monkeypatch.setattr(training, "SAVE_EVERY_STEPS", 2)
    recipe = Recipe(teacher="teacher", task="sst2", data="data", epochs=3, learning_rate=1e-3)

    def run(work: Path, resume_from: Path | None = None) -> dict[str, torch.Tensor]:
        module = build_module(recipe, recipe.teacher)
        training.train(
            module,
            build_data(recipe),
            epochs=recipe.epochs,
            work=work,
            callbacks=build_callbacks(recipe),
            resume_from=resume_from,
        )
        return module.state_dict()

    torch.manual_seed(0)
    whole = run(place / "whole")

    steps = {"after the save on the epoch's last step": 8, "in mid-epoch": 7}[kill_at]
    from fiftyfold.modules import DistillationModule

    original = DistillationModule.on_train_batch_start if hasattr(DistillationModule, "on_train_batch_start") else None
    assert original is not None

    def die(module: DistillationModule, *arguments: object) -> None:
        if module.global_step >= steps:
            raise KilledError
        original(module, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "on_train_batch_start", die)
        torch.manual_seed(0)
        with pytest.raises(KilledError):
            run(place / "killed")
    torch.manual_seed(1)
    resumed = run(place / "killed", place / "killed" / "last.ckpt")

    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    best, other = (torch.load(place / run / "best.ckpt", weights_only=True) for run in ("whole", "killed"))
    assert best["global_step"] == other["global_step"]
