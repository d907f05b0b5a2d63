"""Fine-tuning: how a teacher is made, and the baseline without distillation."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.trainable import make_trainable
from fiftyfold.modules.pretrained import has_packed_layers, open_pretrained
from fiftyfold.modules.structure import attach_structure
from fiftyfold.modules.task_module import Batch, TaskModule, label_loss, true_labels


class FineTuningModule(TaskModule):
    """Trains a transformers model on the labels of a task.

    Args:
        model: a folder or hub id; from an exported folder, training goes on. A missing classifier is made anew, and so
            is one whose number of labels differs. A model is taken as it is (a packed one can be scored, not trained)
            and is not stored: ``load_from_checkpoint`` then needs it as ``model=``.
        num_labels: number of classes, 1 for regression; by default what the model's configuration says.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices; biases and normalisation weights have none.
        warmup: share of the training over which the learning rate rises before it falls to zero.

    Raises:
        FiftyfoldError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        num_labels: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-5),
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(optimizer, weight_decay, warmup)
        unstored = [] if isinstance(model, str) else ["model"]
        self.save_hyperparameters(ignore=unstored)
        self.save_hyperparameters(ignore=[*unstored, *self._unstorable_hyperparameters()])
        self.model = load_student(model, "model", num_labels) if isinstance(model, str) else model
        attach_structure(self.model)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The model."""
        return self.model

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss against the labels."""
        return {"loss": label_loss(self(batch), true_labels(batch))}


def load_student(source: str, role: str, num_labels: int | None = None) -> PreTrainedModel:
    """Load a model for sequence classification, ready to train.

    An exported folder's packed layers become quantized ones with floating-point weights.

    Args:
        source: a folder or hub id.
        role: how messages call the model.
        num_labels: number of labels; None for what the configuration says.

    Raises:
        FiftyfoldError: if there is no such model, it cannot be read, or its backbone lacks weights.
    """
    model = load_classifier(source, role, num_labels)
    if has_packed_layers(model):
        make_trainable(model)
    # from_pretrained returns a model in eval mode, and Lightning keeps the mode that it finds.
    return model.requires_grad_(True).float().train()


def load_teacher(source: str) -> PreTrainedModel:
    """Load a model that was fine-tuned for sequence classification.

    Args:
        source: a folder or hub id.

    Raises:
        FiftyfoldError: if there is no such model, it cannot be read, or a part of it would have random weights.
    """
    return _load_classifier(source, "teacher", None, complete=True)


def load_classifier(source: str, role: str, num_labels: int | None = None) -> PreTrainedModel:
    """Load a model for sequence classification, in float32; a head or pooler that is missing is made anew.

    Args:
        source: a folder or hub id.
        role: how messages call the model.
        num_labels: number of labels; None for what the configuration says.

    Raises:
        FiftyfoldError: if there is no such model, it cannot be read, or its backbone lacks weights.
    """
    return _load_classifier(source, role, num_labels, complete=False)


def _load_classifier(source: str, role: str, num_labels: int | None, *, complete: bool) -> PreTrainedModel:
    def adapt(config: PretrainedConfig) -> bool:
        other_head = num_labels is not None and num_labels != config.num_labels
        if other_head:
            config.num_labels = num_labels
        if num_labels == 1:
            config.problem_type = "regression"
        return other_head

    model, missing = open_pretrained(
        AutoModelForSequenceClassification, source, role=role, kind="classifier", adapt=adapt
    )
    if lost := [name for name in missing if _in_backbone(name, model)]:
        raise FiftyfoldError(
            f"the {role} {source!r} lacks {len(lost)} weights of its backbone, such as {lost[0]!r}; copy or save it "
            "again."
        )
    if complete and missing:
        raise FiftyfoldError(
            f"the {role} {source!r} was not fine-tuned as a classifier: it has no weights for {missing[0]!r}; "
            "fine-tune it first (FineTuningModule)."
        )
    return model


def _in_backbone(name: str, model: PreTrainedModel) -> bool:
    # Models that were trained to fill in masks have no pooler.
    return name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name.split(".")
