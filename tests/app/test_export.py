from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from fiftyfold.app.main import main
from fiftyfold.modules import DistillationModule
from tests.app.conftest import write_teacher

DATA = ["--data", "GLUEDataModule", "--data.task", "sst2", "--data.data", "data", "--data.tokenizer", "teacher"]
QUIET = ["--trainer.logger", "false", "--trainer.max_epochs", "1"]
FINE_TUNING = ["--model", "FineTuningModule", "--model.model", "teacher"]
DISTILLATION = ["--model", "DistillationModule", "--model.teacher", "teacher"]


def trained(place: Path, *words: str) -> str:
    assert main(["fit", *words, *DATA, *QUIET, "--trainer.default_root_dir", str(place)]) == 0
    (found,) = place.rglob("*.ckpt")
    return str(found)


def test_an_unquantized_model_becomes_a_teacher(place: Path) -> None:
    checkpoint = trained(place, *FINE_TUNING)
    assert main(["export", checkpoint, "plain", "--rest_dtype", "float32"]) == 0
    model, loading = AutoModelForSequenceClassification.from_pretrained(place / "plain", output_loading_info=True)
    assert not any(loading.values()), "transformers prints a report of what is missing or left over"
    assert not hasattr(model.config, "quantization_config")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(place / "plain")) == model.config.vocab_size
    assert len({path.stat().st_mode for path in (place / "plain").iterdir()}) == 1
    DistillationModule(str(place / "plain"))


@pytest.mark.parametrize("hyperparameters", [{"model": {"width": 8}}, {"teacher": 3}, {"model": "teacher"}, {}])
def test_another_modules_checkpoint_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], hyperparameters: dict[str, object]
) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": hyperparameters}, place / "foreign.ckpt")
    assert main(["export", "foreign.ckpt", "out"]) == 1
    assert "is not a checkpoint of one of fiftyfold's modules" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_folder_that_has_changed_since_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained(place, *FINE_TUNING)
    write_teacher(place / "deeper", layers=5)
    assert main(["export", checkpoint, "out", "--model", "deeper"]) == 1
    assert "does not fit FineTuningModule" in capsys.readouterr().err


def test_a_teacher_that_moved_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained(place, *DISTILLATION, "--trainer.callbacks+=QuantizationAwareTraining")
    (place / "teacher").rename(place / "elsewhere")
    assert main(["export", checkpoint, "packed"]) == 1
    assert "teacher" in capsys.readouterr().err
    assert main(["export", checkpoint, "packed", "--model", "elsewhere"]) == 1
    assert "leave --model out" in capsys.readouterr().err
    assert main(["export", checkpoint, "packed", "--teacher", "elsewhere"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(place / "packed")
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_a_folder_below_the_home_folder_is_not_replaced(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place / "home"))
    (place / "home" / "mine").mkdir(parents=True)
    (place / "home" / "mine" / "letter.txt").write_text("dear")
    checkpoint = trained(place, *FINE_TUNING)
    assert main(["export", checkpoint, "~/mine"]) == 1
    assert "already holds something" in capsys.readouterr().err
    assert (place / "home" / "mine" / "letter.txt").read_text() == "dear"
    assert main(["export", checkpoint, "~/new"]) == 0
    assert (place / "home" / "new" / "config.json").is_file()


def test_a_tokenizer_without_padding_is_written_as_training_had_it(tmp_path: Path) -> None:
    from fiftyfold.app.export import _load_tokenizer

    backend = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path)
    assert _load_tokenizer(str(tmp_path)).pad_token == "<end>"
