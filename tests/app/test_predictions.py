"""What ``fiftyfold predict`` leaves behind."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest

from fiftyfold.app.main import main
from fiftyfold.app.predictions import PredictionWriter
from fiftyfold.datamodules import GLUEDataModule
from fiftyfold.modules import DistillationModule, FineTuningModule
from tests.app.conftest import write_teacher
from tests.ranks import run_on_ranks

SENTENCES = ["the film was not boring .", "a good plot", "bad", "the story was very dull and poor", "good"]
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
LABELS = {"sst2": ("negative", "positive"), "mnli": ("entailment", "neutral", "contradiction"), "stsb": ()}


def words(task: str = "sst2", *, kind: str = "FineTuningModule", role: str = "model") -> list[str]:
    module = ["--model", kind, f"--model.{role}", "teacher"]
    data = ["--data", "GLUEDataModule", "--data.task", task, "--data.data", "data", "--data.tokenizer", "teacher"]
    return ["predict", *module, *data, "--data.eval_batch_size", "2", *QUIET]


def write_test(place: Path, task: str, name: str = "test") -> None:
    columns = ["index", "sentence"] if task == "sst2" else ["index", "sentence1", "sentence2"]
    rows = [[str(number), *[text] * (len(columns) - 1)] for number, text in enumerate(SENTENCES)]
    (place / "data" / task).mkdir(exist_ok=True)
    (place / "data" / task / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]))


def expected(place: Path, task: str, count: int = len(SENTENCES)) -> str:
    """Each sentence on its own."""
    data = GLUEDataModule(task, str(place / "teacher"), str(place / "data"), eval_batch_size=1)
    data.setup("predict")
    loaders = data.predict_dataloader()
    module = FineTuningModule(str(place / "teacher")).eval()
    lines = ["index\tprediction"]
    for index, batch in enumerate(loaders[0] if isinstance(loaders, list) else loaders):
        (logits,) = module(batch)
        lines.append(f"{index}\t{LABELS[task][logits.argmax()] if LABELS[task] else f'{float(logits.detach()):.6g}'}")
    assert len(lines) == count + 1
    return "\n".join(lines) + "\n"


def numbers(text: str) -> list[float]:
    head, *lines = (line.split("\t") for line in text.splitlines())
    assert head == ["index", "prediction"]
    assert [int(index) for index, _ in lines] == list(range(len(lines)))
    return [float(predicted) for _, predicted in lines]


@pytest.mark.parametrize(("kind", "role"), [("FineTuningModule", "model"), ("DistillationModule", "teacher")])
def test_a_row_is_a_line_in_the_order_of_the_file(
    place: Path, kind: str, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "data" / "SST-2").rename(place / "data" / "sst2")
    write_test(place, "sst2")
    assert main(words(kind=kind, role=role)) == 0
    assert (place / "predictions.tsv").read_text() == expected(place, "sst2")
    assert f"predictions.tsv: {len(SENTENCES)} predictions\n" in capsys.readouterr().out


def test_without_a_test_set_it_is_the_development_set_and_said(place: Path) -> None:
    with pytest.warns(UserWarning, match="has no test set: the development set is predicted"):
        assert main([*words(), "--predictions", "new/mine.txt"]) == 0
    assert (place / "new" / "mine.txt").read_text() == expected(place, "sst2", count=32)


def test_a_regression_gives_numbers_and_two_sets_two_files(place: Path) -> None:
    write_teacher(place / "teacher", labels=1)
    write_test(place, "stsb")
    assert main(words("stsb")) == 0
    found = numbers((place / "predictions.tsv").read_text())
    assert found == pytest.approx(numbers(expected(place, "stsb")), abs=1e-5)
    assert len(set(found)) == len(SENTENCES)
    write_teacher(place / "teacher", labels=3)
    for name in ("test_matched", "test_mismatched"):
        write_test(place, "mnli", name)
    assert main(words("mnli")) == 0
    for name in ("test_matched", "test_mismatched"):
        assert (place / f"predictions_{name}.tsv").read_text() == expected(place, "mnli")


def test_no_file_is_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "predictions.tsv").write_text("precious")
    assert main(words()) == 1
    assert "predictions.tsv is there already; name another file" in capsys.readouterr().err
    assert (place / "predictions.tsv").read_text() == "precious"


def test_a_run_with_a_logger_has_its_own(place: Path) -> None:
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]
    for _ in range(2):
        assert main([*words(), *logger]) == 0
    found = sorted(str(path.relative_to(place)) for path in place.rglob("predictions.tsv"))
    assert found == [f"logs/lightning_logs/version_{number}/predictions.tsv" for number in range(2)]


def test_a_language_model_has_nothing_to_predict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = ["--model", "LanguageModelingModule", "--model.model", "teacher", "--model.objective", "masked"]
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig.from_pretrained(place / "teacher")).save_pretrained(place / "teacher")
    assert main(["predict", *module, *words()[5:]]) == 1
    assert "a language model gives none" in capsys.readouterr().err


def test_another_module_needs_a_writer_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--model", "lightning.pytorch.demos.boring_classes.BoringModel", *QUIET]
    assert main(words) == 1
    assert "nobody would write what BoringModel predicts" in capsys.readouterr().err


def predict_on_ranks(place: str) -> str:
    folder = Path(place)
    data = GLUEDataModule("stsb", str(folder / "teacher"), str(folder / "data"), eval_batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[PredictionWriter(str(folder / "both.tsv"))],
    )
    trainer.predict(DistillationModule(str(folder / "teacher")), datamodule=data)
    return (folder / "both.tsv").read_text() if trainer.is_global_zero else ""


def test_two_processes_write_one_file_in_order(place: Path) -> None:
    write_teacher(place / "teacher", labels=1)
    write_test(place, "stsb")
    found = numbers(run_on_ranks(predict_on_ranks, str(place))[0])
    assert found == pytest.approx(numbers(expected(place, "stsb")), abs=1e-5)
