"""The commands for language models, on a model small enough to heal in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fiftyfold
from fiftyfold.app.main import main
from fiftyfold.app.trainer_cli import RECIPES
from tests.text import tiny_language_model, write_text, write_word_tokenizer

HEALING_RECIPES = sorted((RECIPES / "compactifai").glob("*.yaml"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_text(tmp_path / "data")
    tiny_language_model(hidden=64, layers=6).save_pretrained(tmp_path / "teacher")
    write_word_tokenizer(tmp_path / "teacher")
    return tmp_path


@pytest.mark.parametrize("recipe", HEALING_RECIPES, ids=[path.stem for path in HEALING_RECIPES])
def test_every_recipe_runs_and_its_checkpoint_is_exported(recipe: Path, place: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    assert content["model"]["class_path"] == "HealingModule"
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"]
    data = ["--data.sequence_length", "12", "--data.batch_size", "4"]
    name = f"compactifai/{recipe.stem}"
    words = ["fit", "--config", name, *data, *limits, "--trainer.default_root_dir", str(place)]
    assert main(words) == 0
    checkpoint = next(place.rglob("best.ckpt"))
    assert not any("teacher" in key for key in torch.load(checkpoint, weights_only=True)["state_dict"])
    assert main(["export", str(checkpoint), "packed"]) == 0
    model = AutoModelForCausalLM.from_pretrained("packed")
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 8)


def test_evaluate_writes_the_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "teacher", "--data", "data", "--output", "one.json"]) == 0
    figures = json.loads(Path("one.json").read_text())
    assert figures["split"] == "test"
    assert figures["window"] == 40
    assert figures["stride"] == 20
    assert figures["tokens"] == 12 * 16 - 1
    assert main(["evaluate", "teacher", "--data", "data/train.txt", "--way", "documents", "--limit", "3"]) == 0
    assert json.loads(capsys.readouterr().out.partition("}\n")[2])["tokens"] == 45
    assert main(["evaluate", "teacher", "--data", "data", "--output", "one.json"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "teacher", "--data", "absent.txt"], "no text at"),
        (["evaluate", "teacher", "--data", "data/train.txt", "--split", "test"], "no test text"),
        (["evaluate", "teacher", "--data", "data", "--window", "50"], "reads at most 40"),
        (["evaluate", "teacher", "--data", "data", "--tokenizer", "large"], "60 tokens"),
        (
            ["evaluate", "teacher", "--data", "data", "--objective", "masked"],
            "mask token|no masked language model|cannot",
        ),
        (["plan", "absent"], "no configuration"),
        (["plan", "teacher", "--keep", "0"], "between 0 and 1"),
        (["plan", "teacher", "--recipe", "absent"], "no recipe"),
        (["plan", "teacher", "--recipe", "xtc/teacher"], "no recipe with callbacks|compresses anything"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, words: list[str], message: str, capsys) -> None:
    import re

    write_word_tokenizer(place / "large", size=60)
    assert main(words) == 1
    assert re.search(message, capsys.readouterr().err)


def plan_rows(*words: str) -> list[dict]:
    Path("plan.json").unlink(missing_ok=True)
    assert main(["plan", *words, "--output", "plan.json"]) == 0
    return json.loads(Path("plan.json").read_text())


def test_the_sizes_of_compactifais_first_table(place: Path) -> None:
    """Table I: 27.1, 6.8 and 3.4 GB; 2.1 billion parameters in 4.1 GB, and 2.1 GB with 4-bit down projections."""
    rows = plan_rows(
        "compactifai/llama2_7b",
        "--recipe",
        "compactifai/size_faithful",
        "--rest_bits",
        "4",
        "--rest_targets",
        "[down_proj]",
    )
    assert [round(row["gigabytes"], 2) for row in rows] == [26.95, 13.48, 6.74, 3.37, 4.18, 2.06]
    assert [round(row["parameters"] / 1e9, 2) for row in rows] == [6.74] * 4 + [2.09] * 2


def test_the_papers_advice_gives_a_larger_model(place: Path) -> None:
    rows = plan_rows("compactifai/llama2_7b", "--recipe", "compactifai/advice_faithful")
    assert round(rows[-1]["parameters"] / 1e9, 2) == 2.45


def test_a_plan_is_what_the_export_weighs(place: Path) -> None:
    from fiftyfold.modules import quantize, quantize_bitsandbytes, reduce_layers, tensorize

    rows = plan_rows(
        "teacher",
        *("--layers", "every-other", "--keep", "0.3", "--cores", "2", "--exclude", "[down_proj]", "--rest_bits", "8"),
    )
    model = AutoModelForCausalLM.from_pretrained("teacher")
    reduce_layers(model, "every-other")
    tensorize(model, cores=2, keep=0.3, exclude="down_proj")
    quantize_bitsandbytes(model, 8)
    report = fiftyfold.export(model, "out")
    assert report.file_bytes - report.part_bytes["header"] == pytest.approx(rows[-1]["gigabytes"] * 1e9, rel=0.01)
    rows = plan_rows("teacher", "--keep", "0.3", "--weight_bits", "8")
    model = AutoModelForCausalLM.from_pretrained("teacher")
    tensorize(model, keep=0.3)
    quantize(model, weight_bits=8)
    report = fiftyfold.export(model, "out2")
    assert report.file_bytes - report.part_bytes["header"] == pytest.approx(rows[-1]["gigabytes"] * 1e9, rel=0.02)
