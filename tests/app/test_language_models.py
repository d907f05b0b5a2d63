"""The commands for language models, on a model small enough to heal in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fiftyfold
from fiftyfold.app.main import main
from fiftyfold.app.trainer_cli import RECIPES
from fiftyfold.file_lock import sole_writer
from fiftyfold.modules.journal import LINES_FILE, Journal
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


def test_a_masked_model_is_scored_on_the_split_that_the_figures_name(place: Path) -> None:
    from transformers import BertForMaskedLM

    from tests.tiny import tiny_config

    BertForMaskedLM(tiny_config("bert", vocab=50)).save_pretrained(place / "masked")
    write_word_tokenizer(place / "masked", kind="masked")
    words = ["evaluate", "masked", "--data", "data/train.txt", "--objective", "masked", "--window", "12"]

    def figures(*more: str) -> dict:
        Path("figures.json").unlink(missing_ok=True)
        assert main([*words, *more, "--output", "figures.json"]) == 0
        return json.loads(Path("figures.json").read_text())

    whole = figures()
    assert whole["split"] == "train"
    # 12 documents of 15 words and a separator make 19 sequences of 10 words; of each, 1 or 2 are hidden.
    assert 19 <= whole["tokens"] <= 38, "all of the file, and not the part that training would hold out"
    assert whole["stride"] is None
    assert figures("--limit", "24")["tokens"] <= 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "teacher", "--data", "absent.txt"], "no text at"),
        (["evaluate", "teacher", "--data", "data/train.txt", "--split", "test"], "no test text"),
        (["evaluate", "teacher", "--data", "data", "--window", "50"], "reads at most 40"),
        (["evaluate", "teacher", "--data", "data", "--limit", "0"], "limit is 0"),
        (["evaluate", "teacher", "--data", "data", "--way", "documents", "--window", "1"], "predicts nothing"),
        (["evaluate", "teacher", "--data", "data", "--tokenizer", "large"], "60 tokens"),
        (
            ["evaluate", "teacher", "--data", "data", "--objective", "masked"],
            "mask token|no masked language model|cannot",
        ),
        (["plan", "absent"], "no configuration"),
        (["plan", "teacher", "--keep", "0"], "between 0 and 1"),
        (["plan", "teacher", "--keep", "0.3", "--bond_dimension", "4"], "give one of them"),
        (["plan", "teacher", "--recipe", "compactifai/heal_blocks", "--keep", "0.3"], "are tensorized already"),
        (["plan", "teacher", "--recipe", "absent"], "no recipe"),
        (["plan", "teacher", "--recipe", "xtc/teacher"], "no recipe with callbacks|compresses anything"),
        (["plan", "teacher", "--recipe", "compactifai/chosen_by_data"], "MatrixCompression, whose networks the data"),
        (["plan", "teacher", "--recipe", "odd.yaml"], "no recipe with callbacks"),
        (["plan", "teacher", "--recipe", "typo.yaml"], "QuantizationAwareTraining cannot be carried out"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, words: list[str], message: str, capsys) -> None:
    import re

    write_word_tokenizer(place / "large", size=60)
    Path("odd.yaml").write_text("trainer: {callbacks: [QuantizationAwareTraining]}")
    arguments = "{class_path: QuantizationAwareTraining, init_args: {weigth_bits: 1}}"
    Path("typo.yaml").write_text(f"trainer: {{callbacks: [{arguments}]}}")
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


def test_a_plan_counts_ternary_weights_as_they_are_packed(place: Path) -> None:
    from fiftyfold.modules import quantize

    rows = plan_rows("teacher", "--weight_bits", "2")
    model = AutoModelForCausalLM.from_pretrained("teacher")
    quantize(model, weight_bits=2)
    report = fiftyfold.export(model, "out")
    assert report.file_bytes - report.part_bytes["header"] == pytest.approx(rows[-1]["gigabytes"] * 1e9, rel=0.01)


def test_a_plan_leaves_out_the_layers_that_a_recipe_leaves_out(place: Path) -> None:
    recipe = """
        model: {class_path: DistillationModule, init_args: {teacher: t, layers: first, keep: 4}}
        trainer:
          callbacks:
            - {class_path: LayerPruning, init_args: {schedule: {"epoch:1": 1, "epoch:2": 1}}}
            - {class_path: QuantizationAwareTraining, init_args: {weight_bits: {"fraction:0.5": 1, 0: 8}}}
    """
    Path("recipe.yaml").write_text(recipe)
    rows = plan_rows("teacher", "--recipe", "recipe.yaml")
    assert [row["model"] for row in rows[4:]] == ["layers reduced", "layers pruned", "quantized"]
    by_hand = plan_rows("teacher", "--layers", "first", "--keep_layers", "2", "--weight_bits", "1")
    assert rows[-1]["parameters"] == by_hand[-1]["parameters"]
    assert rows[-1]["gigabytes"] == by_hand[-1]["gigabytes"]


@pytest.mark.parametrize("metric", ["accuracy", "output_error"])
def test_a_profile_goes_on_where_it_was_interrupted(place: Path, metric: str, monkeypatch, capsys) -> None:
    words = ["profile", "teacher", "--data", "data", "--metric", metric, "--bond_dimensions", "[2,8]"]
    words += ["--targets", "[layers.0.mlp,layers.5.self_attn.q]", "--output", "whole", "--tokens", "120"]
    assert main(words) == 0
    whole = json.loads(Path("whole/profile.json").read_text())
    assert len(whole["cells"]) == 8
    assert Path("whole/profile.png").stat().st_size > 1000
    assert len(Path("whole/profile.csv").read_text().splitlines()) == 9
    by_layer = {}
    for cell in whole["cells"]:
        by_layer.setdefault(cell["layer"], []).append(cell["value"])
    if metric == "output_error":
        assert all(small > large for small, large in by_layer.values()), "a larger bond errs less"

    words[words.index("whole")] = "part"
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        assert main(words) == 130
    file = Path("part") / LINES_FILE
    assert len(file.read_text().splitlines()) == 4
    file.write_text(file.read_text() + '{"key": "model.la')
    assert main(words) == 0
    assert json.loads(Path("part/profile.json").read_text()) == whole
    assert main([*words[:-1], "60"]) == 1, "other options"
    assert main([*words, "--document_separator", "w1"]) == 1, "other documents"
    assert main([*words[:-1], "0"]) == 1, "no text"
    for changed in (next(Path("data").glob("valid*")), Path("teacher/model.safetensors")):
        change(changed)
        assert main(words) == 1, f"another {changed}"
        assert "another model or text" in capsys.readouterr().err


def change(file: Path) -> None:
    """Alter a text's order, or a model's weights."""
    if file.suffix == ".txt":
        file.write_text("\n".join(reversed(file.read_text().split("\n"))))
    else:
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_profile_that_fails_before_its_first_cell_leaves_its_folder(place: Path, capsys) -> None:
    words = ["profile", "teacher", "--data", "data", "--bond_dimensions", "2", "--targets", "layers.0.mlp.up"]
    words += ["--output", "out"]
    assert main([*words, "--tokens", "1"]) == 1
    assert main([*words, "--tokens", "120"]) == 0
    assert "1 cells" in capsys.readouterr().out


def test_what_is_compressed_already_is_not_profiled(place: Path, capsys) -> None:
    assert main(["tensorize", "teacher", "--data", "data", "--keep", "0.5", "--epochs", "0", "--output", "small"]) == 0
    assert main(["profile", "small", "--data", "data", "--bond_dimensions", "2", "--tokens", "120"]) == 1
    assert "no dense linear layer to profile" in capsys.readouterr().err


def cut_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let Ctrl-C come once so many things have been found, and are kept."""
    add, added = Journal.add, []

    def cut(self, *arguments):
        if len(added) == count:
            raise KeyboardInterrupt
        added.append(add(self, *arguments))

    patch.setattr(Journal, "add", cut)


def test_a_larger_sweep_measures_only_what_is_new(place: Path, monkeypatch, capsys) -> None:
    words = ["profile", "teacher", "--data", "data", "--tokens", "120", "--output", "out", "--targets", "layers.0.mlp"]
    assert main([*words, "--bond_dimensions", "[2, 4]"]) == 0
    before = json.loads(Path("out/profile.json").read_text())["cells"]
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        assert main([*words, "--bond_dimensions", "[3, 2, 4]"]) == 0, "one for each matrix"
    after = json.loads(Path("out/profile.json").read_text())["cells"]
    assert [cell["bond_dimension"] for cell in after] == [2, 3, 4] * 3
    assert [cell for cell in after if cell["bond_dimension"] != 3] == before
    assert "9 cells" in capsys.readouterr().out
    assert main([*words, "--bond_dimensions", "2", "--exclude", "up_proj"]) == 0
    assert json.loads(Path("out/profile.json").read_text())["cells"] == after, "what is known stays in the table"


@pytest.mark.parametrize("change", [{"layer": "no_such"}, {"layer": []}, {"bond_dimension": 3}, {"value": "high"}])
def test_a_profiles_altered_cell_is_named(change: dict[str, object]) -> None:
    from dataclasses import asdict

    from fiftyfold.app.profile import Cell, _key, _read_cell

    cell = Cell("layer", 2, 0.5, "nats", 1.0, 0.1)
    assert _read_cell(asdict(cell), _key("layer", 2), "nats", ["layer"]) == cell
    with pytest.raises((ValueError, TypeError)):
        _read_cell(asdict(cell) | change, _key("layer", 2), "nats", ["layer"])
    endless = Cell("layer", 2, 0.5, "nats", float("inf"), float("inf"))
    assert _read_cell(json.loads(json.dumps(asdict(endless))), _key("layer", 2), "nats", ["layer"]) == endless
    with pytest.raises(ValueError, match="another cell"):
        _read_cell(asdict(cell), _key("layer", 2), "nats", ["other"])


def test_profiling_leaves_the_model_as_it_was() -> None:
    from fiftyfold.modules.layer_sensitivity import approximated, input_moments, output_error
    from fiftyfold.modules.tensor_network.form import balanced_form, low_rank_form
    from tests.text import tokens

    for kind, name in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.attn.c_proj")):
        model = tiny_language_model(kind)
        layer, expected = model.get_submodule(name), model(tokens()).logits
        full = low_rank_form((layer.weight.shape if kind == "llama" else layer.weight.shape[::-1]), 16)
        with approximated(layer, full):
            torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-3)
        with approximated(layer, balanced_form(full.shape, 3, 1)):
            assert not torch.allclose(model(tokens()).logits, expected, atol=1e-4)
        assert torch.equal(model(tokens()).logits, expected)
        moments = input_moments(model, [name], [{"input_ids": tokens()}])[name]
        assert output_error(layer, full, moments) < 1e-3
        assert 0.1 < output_error(layer, balanced_form(full.shape, 3, 1), moments) < 1.5


def tensorize_words(*more: str) -> list[str]:
    words = ["tensorize", "teacher", "--data", "data", "--keep", "0.3", "--sequence_length", "12", "--batch_size", "4"]
    return [*words, "--output", "small", *more]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--method", "weights"),
        ("--core_bits", "8"),
        ("--core_bits", "8", "--epochs", "0"),
        ("--method", "weights", "--core_bits", "8", "--block_share", "0"),
        ("--method", "weights", *"--exclude [down_proj] --rest_bits 4 --cores 2 --split low_rank".split()),
        ("--epochs", "0"),
    ],
    ids=[
        "by activations",
        "by weights",
        "few bits by activations",
        "few bits, not healed",
        "8-bit cores by weights",
        "rest in 4 bits",
        "not healed",
    ],
)
def test_a_language_model_in_one_line(place: Path, more: tuple[str, ...], capsys) -> None:
    assert main(tensorize_words(*more)) == 0
    assert "perplexity:" in capsys.readouterr().out
    report = json.loads(Path("small/fiftyfold_report.json").read_text())
    assert set(report["scores"]) == {"original", "decomposed", "exported"}
    assert Path("small/fiftyfold_report.png").stat().st_size > 5000
    assert main(["report", "small"]) == 0
    assert Path("small/model.safetensors").stat().st_size < Path("teacher/model.safetensors").stat().st_size / 3
    assert not Path("small.work").exists()
    model = AutoModelForCausalLM.from_pretrained("small")
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 6)
    assert main(tensorize_words(*more)) == 1, "nothing is overwritten"


@pytest.mark.parametrize("more", [(), ("--core_bits", "8")], ids=["16 bits", "few bits"])
def test_healing_that_makes_it_worse_is_not_kept(place: Path, more: tuple[str, ...], monkeypatch, capsys) -> None:
    from safetensors.torch import load_file

    from fiftyfold.app import tensorize

    assert main(tensorize_words("--epochs", "0", *more)) == 0
    Path("small").rename("unhealed")
    heal = tensorize._heal

    def spoil(*arguments):
        student = heal(*arguments)
        for parameter in student.parameters():
            parameter.data.mul_(50)
        return student

    monkeypatch.setattr(tensorize, "_heal", spoil)
    assert main(tensorize_words(*more)) == 0
    assert "Healing did not help" in capsys.readouterr().out
    unhealed = load_file("unhealed/model.safetensors")
    for name, tensor in load_file("small/model.safetensors").items():
        assert torch.equal(tensor, unhealed[name]), name


@pytest.mark.parametrize("more", [(), ("--core_bits", "8")], ids=["16 bits", "few bits"])
def test_an_interrupted_run_ends_as_the_one_that_was_not(place: Path, more: tuple[str, ...], monkeypatch) -> None:
    from safetensors.torch import load_file

    from fiftyfold.app import training
    from fiftyfold.modules.healing_module import HealingModule

    monkeypatch.setattr(training, "SAVE_EVERY_STEPS", 1)
    assert main(tensorize_words(*more)) == 0
    whole = load_file("small/model.safetensors")
    Path("small").rename("whole")
    original, calls = HealingModule.training_losses, []

    def cut(module, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(module, batch)

    with monkeypatch.context() as patch:
        patch.setattr(HealingModule, "training_losses", cut)
        assert main(tensorize_words(*more)) != 0
    assert Path("small.work/decomposed").is_dir()
    assert main(tensorize_words(*more)) == 0
    for name, tensor in load_file("small/model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    ("more", "count"),
    [((), 5), ((), 40), (("--core_bits", "8"), 30), (("--method", "weights"), 7)],
    ids=["while weighed", "while compressed", "few bits", "by weights"],
)
def test_a_decomposition_goes_on_where_it_was_interrupted(
    place: Path, more: tuple[str, ...], count: int, monkeypatch, capsys
) -> None:
    assert main(tensorize_words("--epochs", "0", *more)) == 0
    whole = Path("small/model.safetensors").read_bytes()
    Path("small").rename("whole")
    with monkeypatch.context() as patch:
        cut_after(patch, count)
        assert main(tensorize_words("--epochs", "0", *more)) == 130
    lines = (Path("small.work/matrices") / LINES_FILE).read_text().splitlines()
    assert len(lines) == count + 1
    assert main(tensorize_words("--epochs", "0", *more, "--keep", "0.4")) == 1
    assert "other options" in capsys.readouterr().err
    assert main(tensorize_words("--epochs", "0", *more)) == 0
    assert Path("small/model.safetensors").read_bytes() == whole
    assert not Path("small.work").exists()


def test_a_run_that_goes_on_scores_nothing_twice(place: Path, monkeypatch) -> None:
    from fiftyfold.app import tensorize
    from fiftyfold.modules.healing_module import HealingModule

    score, scored, original = tensorize.score, [], HealingModule.training_losses

    def note(*arguments):
        scored.append(score(*arguments))
        return scored[-1]

    def cut(module, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorize, "score", note)
    assert main(tensorize_words()) == 0
    Path("small").rename("whole")
    once = [*scored]
    scored.clear()
    monkeypatch.setattr(HealingModule, "training_losses", cut)
    assert main(tensorize_words()) == 130
    monkeypatch.setattr(HealingModule, "training_losses", original)
    assert main(tensorize_words()) == 0
    found = json.loads(Path("small/fiftyfold_report.json").read_text())["scores"]
    assert scored == once
    assert found == json.loads(Path("whole/fiftyfold_report.json").read_text())["scores"]


@pytest.mark.parametrize("what", ["weights", "text", "configuration", "tokenizer"])
def test_a_run_whose_model_or_text_changed_in_healing_is_refused(place: Path, what: str, monkeypatch, capsys) -> None:
    from fiftyfold.modules.healing_module import HealingModule

    def cut(module, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HealingModule, "training_losses", cut)
        assert main(tensorize_words()) == 130
    files = {"weights": "model.safetensors", "configuration": "config.json", "tokenizer": "tokenizer.json"}
    path = Path("teacher") / files[what] if what in files else next(Path("data").glob("valid*"))
    before = path.read_bytes()
    if what == "configuration":
        path.write_bytes(before.replace(b'"silu"', b'"gelu"'))
    elif what == "tokenizer":
        path.write_bytes(before.replace(b'"w1"', b'"w1000"'))
    else:
        change(path)
    assert path.read_bytes() != before
    assert main(tensorize_words()) == 1
    assert "of a model or text that has changed" in capsys.readouterr().err
    path.write_bytes(before)
    assert main(tensorize_words()) == 0


def test_a_run_killed_when_its_folder_had_its_name_shows_the_table(place: Path, monkeypatch, capsys) -> None:
    import shutil

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert main(tensorize_words()) == 0
    table = capsys.readouterr().out
    assert Path("small.work/options.json").is_file()
    assert main(tensorize_words("--keep", "0.4")) == 1, "other options"
    stamp = Path("small.work/options.json")
    before = stamp.read_text()
    stamp.write_text(before.replace('"epochs": 1', '"epochs": 2'))
    assert main(tensorize_words()) == 1, "the work of another run"
    stamp.write_text(before)
    with sole_writer(stamp, "small.work"):
        assert main(tensorize_words()) == 1, "a run that goes on"
    assert stamp.is_file()
    capsys.readouterr()
    assert main(tensorize_words()) == 0
    again = capsys.readouterr().out
    assert "perplexity:" in again
    assert table.endswith(again)
    assert not Path("small.work").exists()
    assert main(tensorize_words()) == 1, "nothing is overwritten"
    Path("small.work").mkdir()
    assert main(tensorize_words()) == 0, "killed at the very last"
    assert not Path("small.work").exists()


def test_options_that_matter_later_may_change_while_matrices_are_compressed(place: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        cut_after(patch, 5)
        assert main(tensorize_words()) == 130
    assert main(tensorize_words("--epochs", "0")) == 0


def test_a_weight_that_is_not_finite_is_found_before_the_first_is_decomposed(place: Path, capsys) -> None:
    model = AutoModelForCausalLM.from_pretrained("teacher")
    model.model.layers[5].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained("teacher")
    assert main(tensorize_words("--method", "weights", "--epochs", "0")) == 1
    assert "not finite" in capsys.readouterr().err
    assert not Path("small.work").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"a": {"b": "c"}}', b"\xff", b"[" * 100_000])
def test_scores_that_cannot_be_read_are_measured_anew(content: bytes, tmp_path: Path) -> None:
    from fiftyfold.app.kept_scores import kept_score

    path = tmp_path / "scores.json"
    path.write_bytes(content)
    assert kept_score(path, [torch.ones(1)], lambda: {"score": 0.1}) == {"score": 0.1}
    assert kept_score(path, [torch.zeros(1)], lambda: {"score": 0.2}) == {"score": 0.2}
    assert kept_score(path, [torch.ones(1)], lambda: pytest.fail("it is known")) == {"score": 0.1}


def test_a_model_that_changed_since_is_refused_and_what_was_found_stays(place: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        cut_after(patch, 5)
        assert main(tensorize_words()) == 130
    change(Path("teacher/model.safetensors"))
    assert main(tensorize_words()) == 1
    assert "another model or text" in capsys.readouterr().err
    assert len((Path("small.work/matrices") / LINES_FILE).read_text().splitlines()) == 6


def test_a_run_that_was_cut_before_its_first_checkpoint_draws_the_same_numbers(place: Path, monkeypatch) -> None:
    from safetensors.torch import load_file
    from transformers import BertForMaskedLM

    from fiftyfold.modules.healing_module import HealingModule
    from tests.tiny import tiny_config

    BertForMaskedLM(tiny_config("bert", layers=2, vocab=50)).save_pretrained(place / "masked")
    write_word_tokenizer(place / "masked", kind="masked")
    more = ("--objective", "masked", "--keep", "0.6", "--limit_train", "8")
    words = ["tensorize", "masked", *tensorize_words(*more)[2:]]
    assert main(words) == 0
    whole = load_file("small/model.safetensors")
    Path("small").rename("whole")

    def cut(module, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HealingModule, "training_losses", cut)
        assert main(words) == 130
    assert Path("small.work/decomposed").is_dir()
    assert not Path("small.work/last.ckpt").exists()
    assert main(words) == 0
    for name, tensor in load_file("small/model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


def test_impossible_orders_are_refused_before_anything_is_written(place: Path, capsys) -> None:
    for more, message in (
        (("--keep", "1.5"), "between 0 and 1"),
        (("--rest_bits", "8", "--exclude", "[absent]"), "absent"),
        (("--epochs", "0", "--core_bits", "8", "--method", "weights"), "core_bits"),
        (("--method", "weights", "--cores", "1"), "cores"),
        (("--sequence_length", "41"), "reads at most 40"),
        (("--keep", ".nan"), "between 0 and 1"),
        (("--limit_train", "4"), "healing in 1 optimizer steps"),
        (("--block_share", "1"), "block_share"),
        (("--hidden_weight", "-1"), "cannot be negative"),
    ):
        assert main(tensorize_words(*more)) == 1
        assert message in capsys.readouterr().err
        assert not Path("small").exists()
