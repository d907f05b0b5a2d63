"""Every case of the table of cases, stopped at every step and resumed, with dropout and shuffling on, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from transformers import PreTrainedModel

from fiftyfold.callbacks import DurableCheckpointIO, RandomStates
from fiftyfold.datamodules import GLUEDataModule, LanguageModelingDataModule
from fiftyfold.modules.structure import compression_root, structure_log
from tests.cases import CASES, Case
from tests.reliability.commands import Run, fit_words, make_place, training_hash
from tests.text import SIZE, write_text, write_word_tokenizer
from tests.tiny import tiny_bert, tiny_causal

STEPS = 8
BATCHES = 4


@dataclass
class ResumeReport:
    """How many resume points were compared with the run that never stopped, and how many were equal bit by bit."""

    compared: int = 0
    identical: int = 0
    different: list[str] | None = None

    def note(self, what: str, equal: bool) -> None:
        self.compared += 1
        self.identical += equal
        if not equal:
            self.different = [*(self.different or []), what]


class Learner(LightningModule):
    """Trains a transformers model, dropout included, on the batches that it is given."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.train()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@dataclass(frozen=True)
class Setting:
    """A model and the data that it learns from."""

    name: str
    module: Callable[[int], LightningModule]
    """Given a seed."""
    data: Callable[[Path], LightningDataModule]


def _glue(place: Path) -> LightningDataModule:
    teacher, data = str(place / "teacher"), str(place / "data")
    return GLUEDataModule("sst2", teacher, data, batch_size=16, cache_dir=str(place / "cache"))


def _masked_text(place: Path) -> LightningDataModule:
    words, text = str(place / "masked-words"), str(place / "text")
    options = {"sequence_length": 12, "batch_size": 4, "limit_train": 16, "cache_dir": str(place / "cache")}
    return LanguageModelingDataModule(words, text, objective="masked", **options)


def _causal_text(place: Path) -> LightningDataModule:
    words, text = str(place / "causal-words"), str(place / "text")
    options = {"sequence_length": 12, "batch_size": 4, "limit_train": 16, "cache_dir": str(place / "cache")}
    return LanguageModelingDataModule(words, text, **options)


def _masked_bert(seed: int) -> LightningModule:
    from transformers import AutoModelForMaskedLM

    from tests.tiny import tiny_config

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Learner(AutoModelForMaskedLM.from_config(tiny_config("bert", hidden=16, vocab=SIZE)))


SETTINGS = (
    Setting("GLUE, BERT", lambda seed: Learner(tiny_bert(hidden=16, vocab=300, seed=seed)), _glue),
    Setting(
        "causal text, GPT-2", lambda seed: Learner(tiny_causal("gpt2", hidden=16, vocab=SIZE, seed=seed)), _causal_text
    ),
    Setting("masked text, BERT", _masked_bert, _masked_text),
)


def compare_all(
    place: Path,
    cases: tuple[Case, ...] = CASES,
    settings: tuple[Setting, ...] = SETTINGS,
    progress: Callable[[str], None] = lambda _: None,
) -> ResumeReport:
    """Resume from every step of every case; in the middle of the second epoch also from a run that was itself resumed.

    Compared are weights, structure log, optimizer, schedule, random states and the data's place in the last
    checkpoint, by the hash of all of it. ``progress`` is told of each case.
    """
    torch.set_num_threads(1)
    prepare(place)
    report = ResumeReport()
    for setting in settings:
        for case in cases:
            try:
                for what, equal in _compare(place, setting, case):
                    report.note(f"{setting.name}, {case}, {what}", equal)
            except Exception as error:  # noqa: BLE001 - one pair that fails leaves the others
                report.note(f"{setting.name}, {case}: {type(error).__name__}: {error}"[:500], equal=False)
            progress(f"{setting.name}, {case}: {report.identical} of {report.compared} in all")
    return report


def compare_command_line(place: Path, pairs: tuple[tuple[int, int], ...] = ((4, 6), (3, 5), (1, 4))) -> ResumeReport:
    """The same through ``fiftyfold fit --ckpt_path``, each run in a process of its own."""
    make_place(place)
    report = ResumeReport()
    Run(fit_words("whole"), place).wait()
    expected = training_hash(place / "whole" / f"step={STEPS}.ckpt")
    for step in range(1, STEPS):
        Run(fit_words(f"from{step}", resume=Path(f"whole/step={step}.ckpt")), place).wait()
        report.note(f"command line, step {step}", _end(place / f"from{step}") == expected)
    for first, second in pairs:
        again = Path(f"from{first}") / f"step={second}.ckpt"
        Run(fit_words(f"again{first}-{second}", resume=again), place).wait()
        report.note(f"command line, step {first}, then {second}", _end(place / f"again{first}-{second}") == expected)
    Run(fit_words("weights", weights_only=True), place).wait()
    for step in range(1, STEPS + 1):
        whole, light = (_weights(place / folder / f"step={step}.ckpt") for folder in ("whole", "weights"))
        report.note(f"command line, weights alone, step {step}", whole == light)
    return report


def prepare(place: Path) -> None:
    """Write the data of all settings."""
    make_place(place)
    write_text(place / "text", documents=40)
    for kind in ("causal", "masked"):
        write_word_tokenizer(place / f"{kind}-words", kind=kind)


def _compare(place: Path, setting: Setting, case: Case) -> Iterator[tuple[str, bool]]:
    name = f"{setting.name}-{case}".replace(" ", "_").replace(",", "")
    whole = place / name
    trainer = _fit(setting, case, place, whole)
    log = structure_log(compression_root(trainer.lightning_module))
    assert [(entry["op"], entry["step"]) for entry in log] == list(case.operations), f"{setting.name}, {case}"
    expected = _end(whole)
    for step in range(1, STEPS):
        folder = place / f"{name}-{step}"
        _fit(setting, case, place, folder, whole / f"step={step}.ckpt")
        yield f"step {step}", _end(folder) == expected
    for first, second in ((BATCHES, BATCHES + 2), (1, BATCHES + 1)):
        folder = place / f"{name}-{first}-{second}"
        _fit(setting, case, place, folder, place / f"{name}-{first}" / f"step={second}.ckpt")
        yield f"step {first}, then {second}", _end(folder) == expected
    fresh = setting.module(5)
    tester = _trainer([*case.callbacks()], None)
    tester.validate(fresh, datamodule=setting.data(place), ckpt_path=whole / f"step={STEPS}.ckpt", verbose=False)
    saved = torch.load(whole / f"step={STEPS}.ckpt", weights_only=True)["state_dict"]
    own = fresh.state_dict()
    yield "restored for validation", list(own) == list(saved) and all(torch.equal(own[key], saved[key]) for key in own)


def _fit(setting: Setting, case: Case, place: Path, folder: Path, checkpoint: Path | None = None) -> Trainer:
    # Another seed: nothing of the result may come from the fresh module's own weights, or from random numbers of now.
    lightning.seed_everything(1 if checkpoint is None else 2, verbose=False)
    trainer = _trainer([RandomStates(), *case.callbacks()], folder)
    trainer.fit(setting.module(0 if checkpoint is None else 3), datamodule=setting.data(place), ckpt_path=checkpoint)
    return trainer


def _trainer(callbacks: list[Callback], folder: Path | None) -> Trainer:
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    return Trainer(
        accelerator="cpu",
        max_epochs=STEPS // BATCHES,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[DurableCheckpointIO()],
    )


def _end(folder: Path) -> str | None:
    last = folder / f"step={STEPS}.ckpt"
    longer = folder / f"step={STEPS + 1}.ckpt"
    return training_hash(last) if last.exists() and not longer.exists() else None


def _weights(path: Path) -> str:
    from tests.reliability.commands import content_hash

    return content_hash(torch.load(path, weights_only=True)["state_dict"])
