"""What fine-tuning and distillation have in common: optimizer, schedule, evaluation."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.evaluation_task import EvaluationTask, UnnamedTask, fit_labels, fit_vocabulary
from fiftyfold.modules.finite_loss import FiniteLossGuard
from fiftyfold.modules.learning_rate import linear_schedule, stage_at, stage_ends

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``attention_mask``, both [batch, tokens]; perhaps ``token_type_ids``; ``labels`` [batch]."""

DATA_KEY = "fiftyfold_data"
"""Where a checkpoint holds what the data told the model: names of labels, padding."""

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TaskModule(LightningModule):
    """A transformers model for sequence classification or regression that is trained and scored on one task.

    Validation logs ``val/<metric>`` for every metric of the datamodule's ``task``, ``val/loss``, and under
    ``val/score`` the metric by which checkpoints are chosen. Further validation sets log ``val_<name>/<metric>``.

    Args:
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices; biases and normalisation weights have none.
        warmup: share of the training (of each stage) over which the learning rate rises.
    """

    def __init__(self, optimizer: OptimizerCallable, weight_decay: float, warmup: float) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise FiftyfoldError(f"warmup is a share of the training, at least 0 and below 1, not {warmup}.")
        if weight_decay < 0:
            raise FiftyfoldError(f"weight_decay cannot be negative ({weight_decay}).")
        self._make_optimizer = optimizer
        self._weight_decay = weight_decay
        self._warmup = warmup
        self._stage_shares: list[float] = [1.0]
        self._loss_guard = FiniteLossGuard()
        self._task: EvaluationTask | None = None
        self._scores: list[dict[str, Metric]] = []

    @property
    @abstractmethod
    def trained_model(self) -> PreTrainedModel:
        """The model that is trained, scored and saved."""

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the training loss by name, among them their sum under ``"loss"``."""

    @property
    def task(self) -> EvaluationTask:
        """The task of the trainer's datamodule, or a plain one with the model's number of labels."""
        return self._task or UnnamedTask(self.trained_model.config.num_labels)

    def setup(self, stage: str) -> None:  # noqa: ARG002 (Lightning passes it by name)
        """Fit the model to the data: labels, vocabulary, padding.

        Raises:
            FiftyfoldError: if they do not fit.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        task, tokenizer = getattr(datamodule, "task", None), getattr(datamodule, "tokenizer", None)
        self._task = task if isinstance(task, EvaluationTask) else None
        for model, role in self._fitted_models():
            if self._task is not None:
                fit_labels(model.config, self._task, role)
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                fit_vocabulary(model.config, tokenizer, role)

    def _fitted_models(self) -> list[tuple[PreTrainedModel, str]]:
        return [(self.trained_model, "model")]

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, [batch, labels]."""
        return self.trained_model(**model_inputs(self.trained_model, batch)).logits  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of one batch and log its parts."""
        losses = self.training_losses(batch)
        loss = losses["loss"]
        self._loss_guard.note(loss, self.global_step)
        size = len(batch["input_ids"])
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=size)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer with its learning-rate schedule."""
        optimizer = self._make_optimizer(decay_groups(self, self._weight_decay))
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}

    def on_validation_epoch_start(self) -> None:
        """Prepare the scores."""
        self._loss_guard.check()
        self._start_scores()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Score one batch."""
        self._score(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Prepare the scores."""
        self._start_scores()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Score one batch."""
        self._score(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:  # noqa: ARG002
        """Return the predicted class indices, or scores for regression, [batch]."""
        return predictions(self(batch))

    def on_train_start(self) -> None:
        """Let the loader find its place: :func:`total_steps` made it before Lightning had read its state."""
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_end(self) -> None:
        """Refuse to end well after a loss that was no number; on an accelerator the last ones are not read yet."""
        self._loss_guard.check()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the data told of labels and padding; refuse weights that a loss without a value has spoilt."""
        self._loss_guard.check()
        config = self.trained_model.config
        checkpoint[DATA_KEY] = {
            "id2label": dict(config.id2label),
            "pad_token_id": getattr(config, "pad_token_id", None),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put labels and padding back, so that a model can be exported without its data."""
        config, told = self.trained_model.config, checkpoint.get(DATA_KEY)
        if told is None:
            return
        try:
            config.id2label = {int(index): str(name) for index, name in told["id2label"].items()}
            config.label2id = {name: index for index, name in config.id2label.items()}
            config.pad_token_id = told["pad_token_id"]
        except Exception as error:  # among others transformers' own, for a padding that is no number
            raise FiftyfoldError(f"the checkpoint's entry {DATA_KEY!r} cannot be read; it is corrupt.") from error

    def current_stage(self) -> int:
        """Return the index of the stage in which the trainer stands."""
        if len(self._stage_shares) == 1:
            return 0
        return stage_at(self.global_step, self._stage_ends())

    def _stage_ends(self) -> list[int]:
        return stage_ends(self._stage_shares, total_steps(self))

    def _schedule(self, optimizer: Optimizer) -> dict[str, Any]:
        return linear_schedule(optimizer, self._stage_ends(), self._warmup)

    def _start_scores(self) -> None:
        self._scores = [
            {name: metric.to(self.device) for name, metric in self._new_metrics().items()}
            for _ in self._evaluation_names()
        ]

    def _new_metrics(self) -> dict[str, Metric]:
        return {**self.task.build_metrics(), "loss": MeanMetric()}

    def _evaluation_names(self) -> list[str]:
        return ["", *list(self.task.validation_names)[1:]]

    def _score(self, batch: Batch, index: int) -> None:
        if "labels" not in batch:
            raise FiftyfoldError(f"this split of {self.task.name!r} has no labels; use predict instead.")
        if index >= len(self._scores):
            raise FiftyfoldError(f"the task {self.task.name!r} names fewer validation sets than there are.")
        labels, logits = batch["labels"], self(batch).float()
        for name, metric in self._scores[index].items():
            if name == "loss":
                metric.update(label_loss(logits, labels), weight=len(labels))
            else:
                metric.update(predictions(logits), labels)

    def _log_scores(self, split: str) -> None:
        for name, metrics, seen in zip(self._evaluation_names(), self._scores, self._seen_by_any_rank(), strict=True):
            if not seen:
                continue
            values = {key: metric.compute() for key, metric in metrics.items()}
            prefix = f"{split}_{name}" if name else split
            self.log_dict({f"{prefix}/{key}": value for key, value in values.items()})
            if not name and self.task.selection_metric in values:
                self.log(f"{split}/score", values[self.task.selection_metric], prog_bar=True)
        self._scores = []

    def _seen_by_any_rank(self) -> list[bool]:
        """Tell which sets gave batches. Computing a metric joins all ranks, also one that had no batch of its own."""
        counts = [metrics["loss"].update_count for metrics in self._scores]
        gathered = self.all_gather(torch.tensor(counts, device=self.device))
        return [bool(count) for count in gathered.reshape(-1, len(counts)).sum(0)]

    def _unstorable_hyperparameters(self) -> list[str]:
        # What LightningCLI hands over is plain; a callable handed over in Python is not, and would make the checkpoint
        # unreadable for torch.load(weights_only=True).
        return [name for name, value in self.hparams.items() if not _is_plain(value)]


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Only what has at least two dimensions decays. In transformers that spares exactly the biases and the normalisation
    weights, under any name.

    Returns:
        One or two parameter groups, each in the module's order.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def total_steps(module: LightningModule) -> int:
    """Return the number of optimizer steps of the whole training.

    Raises:
        FiftyfoldError: if the trainer has no end.
    """
    steps = module.trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise FiftyfoldError("the learning-rate schedule needs an end: give the trainer max_epochs or max_steps.")
    return max(1, int(steps))


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Return the part of a batch that the model's ``forward`` takes."""
    accepted = _accepted_inputs(type(model).forward)
    return {name: batch[name] for name in accepted if name in batch}


def true_labels(batch: Batch) -> Tensor:
    """Return a training batch's labels, [batch].

    Raises:
        FiftyfoldError: if it has none.
    """
    if "labels" not in batch:
        raise FiftyfoldError(
            "these training batches have no labels, but the loss asks for them; leave out the data's unlabelled texts,"
            " or distil with hard_label_share 0."
        )
    return batch["labels"]


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss against the true labels.

    Args:
        logits: [batch, labels]; one column means regression.
        labels: class indices or scores, [batch].

    Returns:
        Mean cross-entropy, or mean squared error, over the batch; in float32.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).float(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def predictions(logits: Tensor) -> Tensor:
    """Return class indices, or scores where there is one column; [batch]."""
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(dim=-1)


@lru_cache
def _accepted_inputs(forward: Callable[..., Any]) -> tuple[str, ...]:
    known = inspect.signature(forward).parameters
    return tuple(name for name in _INPUTS if name in known)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
