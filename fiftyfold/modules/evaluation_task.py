"""What a LightningModule asks of the task that it is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import PearsonCorrCoef
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError

_LEAST_TOKENS = 0.75
"""Of the model's vocabulary, which may be padded to a round number; a tokenizer with fewer is hardly its own."""


@runtime_checkable
class EvaluationTask(Protocol):
    """A task of sequence classification or regression, as a datamodule's ``task`` describes it."""

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 means regression."""

    @property
    def label_names(self) -> Sequence[str]:
        """Names of the classes by index; empty where they have none."""

    @property
    def selection_metric(self) -> str:
        """The metric by which the best checkpoint is chosen."""

    @property
    def validation_names(self) -> Sequence[str]:
        """Names of the validation sets by dataloader index; at least one."""

    def build_metrics(self) -> dict[str, Metric]:
        """Return fresh metrics by name; they take predicted classes (or scores) and labels, one entry per example."""


@dataclass(frozen=True)
class UnnamedTask:
    """Stands in where no datamodule describes its task: accuracy, or Pearson's correlation for one label."""

    num_labels: int
    name: str = "data"
    label_names: tuple[str, ...] = ()
    validation_names: tuple[str, ...] = ("",)

    @property
    def selection_metric(self) -> str:
        """The only metric's name."""
        return "pearson" if self.num_labels == 1 else "accuracy"

    def build_metrics(self) -> dict[str, Metric]:
        """Return the one metric."""
        if self.num_labels == 1:
            return {"pearson": PearsonCorrCoef()}
        return {"accuracy": MulticlassAccuracy(self.num_labels, average="micro")}


def fit_labels(config: PretrainedConfig, task: EvaluationTask, model_name: str) -> None:
    """Check a model's labels against a task's, and name them where the model has no names of its own.

    A warning tells of a model with other names: it may have been made for another task.

    Args:
        config: the model's configuration; ``id2label`` and ``label2id`` may be changed.
        task: what the data are.
        model_name: how messages call the model.

    Raises:
        FiftyfoldError: if the numbers of labels differ, or the same names stand in another order.
    """
    if config.num_labels != task.num_labels:
        raise FiftyfoldError(
            f"the {model_name} has {config.num_labels} label(s), the task {task.name!r} {task.num_labels}; use a model "
            "that was made for this task."
        )
    wanted = [str(name) for name in task.label_names or ()]
    if len(wanted) != task.num_labels or task.num_labels == 1:
        return
    have = [str(config.id2label.get(index, "")) for index in range(len(wanted))]
    if have == [f"LABEL_{index}" for index in range(len(wanted))]:
        config.id2label = dict(enumerate(wanted))
        config.label2id = {name: index for index, name in enumerate(wanted)}
    elif _folded(have) != _folded(wanted) and sorted(_folded(have)) == sorted(_folded(wanted)):
        raise FiftyfoldError(
            f"the {model_name}'s labels stand in the order {have}, the task {task.name!r} has {wanted}; reorder the "
            "data's labels or the model's classifier."
        )
    elif sorted(_folded(have)) != sorted(_folded(wanted)) and not all(name.isdecimal() for name in have):
        # Without the role: warnings of one text show once, and teacher and student have the same labels.
        rank_zero_warn(
            f"The model's labels are {have}, the task {task.name!r} has {wanted}: they are taken for each other in "
            "this order. Was the model made for this task?"
        )


def fit_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
    """Check that a model has an embedding for every token, and tell it the padding token if it knows none.

    A warning tells of a tokenizer with far fewer tokens than the model, whose words may be other words to the model.

    Args:
        config: the model's configuration; ``pad_token_id`` may be set, which decoders need to find the last token.
        tokenizer: makes the tokens.
        model_name: how messages call the model.

    Raises:
        FiftyfoldError: if the tokenizer has more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise FiftyfoldError(
            f"the tokenizer has {len(tokenizer)} tokens, the {model_name}'s vocabulary {config.vocab_size}; use the "
            "tokenizer that belongs to the model."
        )
    if len(tokenizer) < _LEAST_TOKENS * config.vocab_size:
        rank_zero_warn(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}: is it the model's "
            "own? Another one's tokens stand for other words."
        )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _folded(names: list[str]) -> list[str]:
    return [name.casefold().replace(" ", "_") for name in names]
