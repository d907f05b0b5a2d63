"""The models of the missing experiment: what text calibrates, heals and scores them, and how long they heal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fiftyfold.app.training import score
from fiftyfold.datamodules import GLUEDataModule, LanguageModelingDataModule
from fiftyfold.modules import DistillationModule, FineTuningModule, heal
from fiftyfold.modules.fine_tuning import load_teacher
from fiftyfold.modules.perplexity import TextScore, score_documents, score_row
from fiftyfold.modules.tensor_network.moments import Batch


@dataclass(frozen=True)
class Place:
    """Where a study's things are.

    Attributes:
        folder: the model's.
        data: its text.
        cache: where its tokens are kept.
        device: what computes.
    """

    folder: str
    data: str
    cache: str | None
    device: str


class StudiedModel(Protocol):
    """A model with its text: what calibrates and heals is apart from what is scored."""

    teacher: PreTrainedModel

    @property
    def budget(self) -> dict[str, Any]:
        """What every method is given, the learning rates that it may choose from among it."""

    def calibration(self, seed: int) -> Sequence[Batch]:
        """Return the seed's calibration batches."""

    def heal(self, student: PreTrainedModel, seed: int, learning_rate: float) -> float:
        """Let what asks for gradients follow the teacher; return the mean of the last losses."""

    def loss(self, student: PreTrainedModel, seed: int) -> float:
        """Return how bad a student is on text that neither heals it nor is scored: what a rate is chosen by."""

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return figures on the held-out text by name."""


@dataclass(frozen=True)
class TextBudget:
    """What each method is given on a language model."""

    sequence: int = 128
    calibration_sequences: int = 64
    steps: int = 60
    block_steps: int = 30
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (6e-3, 1.5e-3)
    low_bit_rates: tuple[float, ...] = (5e-4,)
    """Tried besides where numbers have less than 16 bits: models that begin well."""


class StudiedLanguageModel:
    """A causal language model that heals block by block, then end to end.

    Args:
        place: where text, as LanguageModelingDataModule takes it, and the rest are.
        budget: what each method is given.
        stories: whether the text is separate stories, each scored on its own, and not one long row.
    """

    def __init__(self, place: Place, budget: TextBudget, *, stories: bool) -> None:
        teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place.folder)
        self.teacher = teacher.to(place.device).eval().requires_grad_(False)
        self._budget, self._stories = budget, stories
        text = LanguageModelingDataModule(
            place.folder, place.data, sequence_length=budget.sequence, cache_dir=place.cache, limit_train=None
        )
        if stories:
            documents = text.documents("train")
            # The first stories are easier than the others.
            self._scored = documents[1700::10]
            self._chosen_by = documents[1600:1700:2]
            row = torch.cat([torch.cat([torch.tensor([1]), story]) for story in documents[100:1600]])
        else:
            self._scored = [text.row("test")[:25_000]]
            self._chosen_by = [text.row("validation")[:12_000]]
            row = text.row("train")
        length = budget.sequence
        self._sequences = row[: len(row) // length * length].view(-1, length)

    @property
    def budget(self) -> dict[str, Any]:
        """What every method is given."""
        return asdict(self._budget)

    def calibration(self, seed: int) -> Sequence[Tensor]:
        """Return the seed's calibration sequences, eight a batch."""
        chosen = self._shuffled(2000 + seed)[: self._budget.calibration_sequences]
        return [chosen[start : start + 8] for start in range(0, len(chosen), 8)]

    def heal(self, student: PreTrainedModel, seed: int, learning_rate: float) -> float:
        """Let what asks for gradients follow the teacher; return the mean of the last ten losses."""
        losses = heal(
            student,
            self.teacher,
            self._shuffled(1000 + seed),
            steps=self._budget.steps,
            block_steps=self._budget.block_steps,
            batch_size=self._budget.batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        return statistics.fmean(losses[-10:])

    def loss(self, student: PreTrainedModel, seed: int) -> float:  # noqa: ARG002 - the same text for every seed
        """Return the nats a token on stories, or a row, between those that heal and those that are scored."""
        return self._score(student, self._chosen_by).nats

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Score the held-out text: a story on its own, or a row in windows of 256 that overlap by half."""
        return self._score(model, self._scored).to_json()

    def _score(self, model: PreTrainedModel, texts: list[Tensor]) -> TextScore:
        if self._stories:
            return score_documents(model, texts, first_token=1, window=512)
        return score_row(model, texts[0], window=256, stride=128)

    def _shuffled(self, seed: int) -> Tensor:
        order = torch.randperm(len(self._sequences), generator=torch.Generator().manual_seed(seed))
        return self._sequences[order]


@dataclass(frozen=True)
class ClassifierBudget:
    """What each method is given on a classifier."""

    task: str = "stsb"
    calibration_batches: int = 32
    steps: int = 60
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (1e-3, 1e-4)
    low_bit_rates: tuple[float, ...] = ()
    choosing_batches: int = 16


class StudiedClassifier:
    """A model fine-tuned on a GLUE task that heals by one-stage distillation, without labels.

    Args:
        place: where GLUE's folder and the rest are.
        budget: what each method is given.
    """

    def __init__(self, place: Place, budget: ClassifierBudget) -> None:
        self.teacher: PreTrainedModel = load_teacher(place.folder).to(place.device).eval().requires_grad_(False)
        self._place, self._budget = place, budget

    @property
    def budget(self) -> dict[str, Any]:
        """What every method is given."""
        return asdict(self._budget)

    def calibration(self, seed: int) -> Sequence[Batch]:
        """Return the first batches of the seed's training order."""
        return self._batches(2000 + seed, 0, self._budget.calibration_batches)

    def heal(self, student: PreTrainedModel, seed: int, learning_rate: float) -> float:
        """Let what asks for gradients follow the teacher; return the last loss."""
        lightning.seed_everything(seed, verbose=False)
        module = DistillationModule(
            self.teacher,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate, fused=True),
            weight_decay=0.0,
        )
        module.student = student.train()
        trainer = lightning.Trainer(
            max_steps=self._budget.steps,
            accelerator="cpu" if self._place.device == "cpu" else "gpu",
            devices=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=self._sentences(1000 + seed))
        return float(trainer.callback_metrics["train/loss"])

    @torch.no_grad()
    def loss(self, student: PreTrainedModel, seed: int) -> float:
        """Return the squared distance from the teacher's outputs on the batches that healing would take next."""
        batches = self._batches(1000 + seed, self._budget.steps, self._budget.choosing_batches)
        device = self._place.device
        inputs = [{name: value.to(device) for name, value in batch.items() if name != "labels"} for batch in batches]
        student.to(device).eval()  # Lightning leaves it on the CPU
        distances = [(student(**each).logits - self.teacher(**each).logits).square().mean() for each in inputs]
        return float(torch.stack(distances).mean())

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the task's metrics on the development set."""
        scores = score(FineTuningModule(model), self._sentences(0))
        return {name.removeprefix("val/"): value for name, value in scores.items()}

    def _batches(self, seed: int, first: int, count: int) -> list[dict[str, Tensor]]:
        data = self._sentences(seed)
        data.prepare_data()
        data.setup("fit")
        return list(itertools.islice(data.train_dataloader(), first, first + count))

    def _sentences(self, seed: int) -> GLUEDataModule:
        return GLUEDataModule(
            self._budget.task,
            self._place.folder,
            self._place.data,
            batch_size=self._budget.batch_size,
            group_by_length=True,
            seed=seed,
            cache_dir=self._place.cache,
        )
