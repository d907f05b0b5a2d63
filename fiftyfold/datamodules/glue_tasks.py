"""The nine GLUE tasks and the diagnostic set: columns, labels, metrics."""

from __future__ import annotations

from dataclasses import dataclass

from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from fiftyfold.errors import FiftyfoldError

SINGLE_SENTENCE_LENGTH = 64
PAIR_LENGTH = 128


@dataclass(frozen=True)
class GLUETask:
    """What distinguishes one GLUE task from the others.

    Attributes:
        name: the task's name, which is also its configuration's name in ``nyu-mll/glue``.
        folder: the task's folder in GLUE's own archive.
        text_columns: for each of the one or two texts, the names that its column goes by: GLUE's own first, then those
            of other copies.
        label_columns: the names that the label's column goes by.
        label_names: one name per class, in the order of their ids; empty for a regression.
        metrics: names of the official metrics, as :meth:`build_metrics` knows them.
        selection_metric: the metric that chooses the best checkpoint. Accuracy rather than F1 for MRPC and QQP, and
            Pearson for STS-B, as XTC's authors do.
        train_splits: the split to train on; empty for the diagnostic set.
        validation_splits: labelled splits to evaluate on, by their names in ``nyu-mll/glue``.
        test_splits: splits to predict; GLUE keeps their labels to itself.
        validation_names: a short name for each validation split; ``""`` where there is one only.
        headerless_columns: the columns of a file without a header line.
        broken_rows: how many rows of a wrong length are passed over in a TSV file. The published QQP file has some
            two dozen, torn by line ends within a question.
    """

    name: str
    folder: str
    text_columns: tuple[tuple[str, ...], ...]
    label_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    selection_metric: str
    train_splits: tuple[str, ...] = ("train",)
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)
    validation_names: tuple[str, ...] = ("",)
    headerless_columns: tuple[str, ...] = ()
    broken_rows: int = 0

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for a regression."""
        return max(len(self.label_names), 1)

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score and not a class."""
        return not self.label_names

    @property
    def is_pair(self) -> bool:
        """Whether a row holds two texts."""
        return len(self.text_columns) == 2

    @property
    def max_length(self) -> int:
        """Longest input in tokens: 64 for one sentence, 128 for two (TernaryBERT's and XTC's setting)."""
        return PAIR_LENGTH if self.is_pair else SINGLE_SENTENCE_LENGTH

    def build_metrics(self) -> dict[str, Metric]:
        """Make fresh official metrics by name.

        Each takes ``(predictions, labels)``: class ids of shape ``[batch]``, or scores of that shape for a regression.
        Values lie in ``[-1, 1]``.
        """
        return {name: _build_metric(name, self.num_labels) for name in self.metrics}


def _build_metric(name: str, classes: int) -> Metric:
    if name == "accuracy":
        return MulticlassAccuracy(num_classes=classes, average="micro")
    if name == "f1":
        return BinaryF1Score()
    if name == "matthews":
        return BinaryMatthewsCorrCoef() if classes == 2 else MulticlassMatthewsCorrCoef(num_classes=classes)
    if name == "pearson":
        return PearsonCorrCoef()
    return SpearmanCorrCoef()


_PREMISE = ("sentence1", "premise", "Premise")
_HYPOTHESIS = ("sentence2", "hypothesis", "Hypothesis")
_NLI_LABELS = ("entailment", "neutral", "contradiction")

TASKS: dict[str, GLUETask] = {
    task.name: task
    for task in (
        GLUETask(
            name="cola",
            folder="CoLA",
            text_columns=(("sentence",),),
            label_columns=("label",),
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews",),
            selection_metric="matthews",
            headerless_columns=("source", "label", "mark", "sentence"),
        ),
        GLUETask(
            name="sst2",
            folder="SST-2",
            text_columns=(("sentence",),),
            label_columns=("label",),
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            selection_metric="accuracy",
        ),
        GLUETask(
            name="mrpc",
            folder="MRPC",
            text_columns=(("#1 String", "sentence1"), ("#2 String", "sentence2")),
            label_columns=("Quality", "label"),
            label_names=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            selection_metric="accuracy",
        ),
        GLUETask(
            name="qqp",
            folder="QQP",
            text_columns=(("question1",), ("question2",)),
            label_columns=("is_duplicate", "label"),
            label_names=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            selection_metric="accuracy",
            broken_rows=50,
        ),
        GLUETask(
            name="stsb",
            folder="STS-B",
            text_columns=(("sentence1",), ("sentence2",)),
            label_columns=("score", "label"),
            label_names=(),
            metrics=("pearson", "spearman"),
            selection_metric="pearson",
        ),
        GLUETask(
            name="mnli",
            folder="MNLI",
            text_columns=(_PREMISE, _HYPOTHESIS),
            label_columns=("gold_label", "label"),
            label_names=_NLI_LABELS,
            metrics=("accuracy",),
            selection_metric="accuracy",
            validation_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
            validation_names=("matched", "mismatched"),
        ),
        GLUETask(
            name="qnli",
            folder="QNLI",
            text_columns=(("question",), ("sentence",)),
            label_columns=("label",),
            label_names=("entailment", "not_entailment"),
            metrics=("accuracy",),
            selection_metric="accuracy",
        ),
        GLUETask(
            name="rte",
            folder="RTE",
            text_columns=(("sentence1",), ("sentence2",)),
            label_columns=("label",),
            label_names=("entailment", "not_entailment"),
            metrics=("accuracy",),
            selection_metric="accuracy",
        ),
        GLUETask(
            name="wnli",
            folder="WNLI",
            text_columns=(("sentence1",), ("sentence2",)),
            label_columns=("label",),
            label_names=("not_entailment", "entailment"),
            metrics=("accuracy",),
            selection_metric="accuracy",
        ),
        GLUETask(
            name="ax",
            folder="diagnostic",
            text_columns=(_PREMISE, _HYPOTHESIS),
            label_columns=("gold_label", "label", "Label"),
            label_names=_NLI_LABELS,
            metrics=("matthews",),
            selection_metric="matthews",
            train_splits=(),
            validation_splits=(),
            validation_names=(),
        ),
    )
}
"""Every task by its name; ``ax`` is the diagnostic set, which a model trained on MNLI is tried on."""


def _normalise(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_ALIASES = {_normalise(alias): task for task in TASKS.values() for alias in (task.name, task.folder)}


def get_task(name: str) -> GLUETask:
    """Find a task by its name or by its folder's name, with or without capitals and hyphens (``SST-2``, ``sst2``).

    Raises:
        FiftyfoldError: if there is no such task.
    """
    task = _ALIASES.get(_normalise(name))
    if task is None:
        trained = ", ".join(name for name, task in TASKS.items() if task.train_splits)
        raise FiftyfoldError(
            f"There is no GLUE task named {name!r}; choose one of {trained}, or ax, which has no training set, to test "
            "or predict."
        )
    return task
