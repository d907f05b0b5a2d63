"""What training and healing of language models have in common: how text is scored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.evaluation_task import EvaluationTask, UnnamedTask, fit_vocabulary
from fiftyfold.modules.pretrained import Objective, load_trainable_language_model
from fiftyfold.modules.structure import attach_structure
from fiftyfold.modules.task_module import Batch, TaskModule, model_inputs

IGNORED_LABEL = -100
"""Label of a position that is not predicted, as torch's and transformers' losses know it."""


class TextModule(TaskModule):
    """A causal or masked language model that is trained and scored on text.

    Validation logs ``val/loss`` (nats a token), ``val/perplexity`` and ``val/accuracy`` (share of the tokens that the
    model thinks likeliest), and under ``val/score`` the accuracy. Each sequence of the batch is scored on its own; for
    the perplexity of a whole text with overlapping windows, see :mod:`fiftyfold.modules.perplexity`.

    Args:
        objective: ``"causal"`` or ``"masked"``.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices.
        warmup: share of the training (of each stage) over which the learning rate rises.
    """

    def __init__(self, objective: Objective, optimizer: OptimizerCallable, weight_decay: float, warmup: float) -> None:
        super().__init__(optimizer, weight_decay, warmup)
        if objective not in ("causal", "masked"):
            raise FiftyfoldError(f"objective is 'causal' or 'masked', not {objective!r}.")
        self.objective: Objective = objective

    @property
    def task(self) -> EvaluationTask:
        """Names the score: accuracy."""
        return UnnamedTask(num_labels=2, name="text")

    def setup(self, stage: str) -> None:
        """Compare models and data: vocabulary, objective, length.

        Raises:
            FiftyfoldError: if they do not fit.
        """
        super().setup(stage)
        datamodule = getattr(self.trainer, "datamodule", None)
        given = getattr(datamodule, "objective", self.objective)
        if given != self.objective:
            raise FiftyfoldError(f"the data are for a {given} model, the module for a {self.objective} one.")
        for model, role in self._fitted_models():
            check_length(model, getattr(datamodule, "sequence_length", 0), role)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, [batch, tokens, vocabulary]."""
        return self.trained_model(**text_inputs(self.trained_model, batch, self.objective)).logits  # type: ignore[no-any-return]

    def _new_metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "perplexity": _Perplexity(), "accuracy": MeanMetric()}

    def _score(self, batch: Batch, index: int) -> None:
        logits, labels = predicted_positions(self(batch), batch["labels"], self.objective)
        loss, count = F.cross_entropy(logits.float(), labels), len(labels)
        metrics = self._scores[index]
        metrics["loss"].update(loss, weight=count)
        metrics["perplexity"].update(loss, weight=count)
        metrics["accuracy"].update((logits.argmax(-1) == labels).float().mean(), weight=count)


class LanguageModelingModule(TextModule):
    """Trains a language model on text alone; also scores one (``fiftyfold validate``).

    Args:
        model: a folder or hub id; from an exported folder, training goes on. A model is taken as it is and is not
            stored: ``load_from_checkpoint`` then needs it as ``model=``.
        objective: ``"causal"`` or ``"masked"``.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices; biases and normalisation weights have none.
        warmup: share of the training over which the learning rate rises before it falls to zero.

    Raises:
        FiftyfoldError: if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        objective: Objective = "causal",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(objective, optimizer, weight_decay, warmup)
        unstored = [] if isinstance(model, str) else ["model"]
        self.save_hyperparameters(ignore=unstored)
        self.save_hyperparameters(ignore=[*unstored, *self._unstorable_hyperparameters()])
        loaded = load_trainable_language_model(model, "model", objective) if isinstance(model, str) else model
        self.model = loaded
        attach_structure(self.model)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The model."""
        return self.model

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy with the text."""
        logits, labels = predicted_positions(self(batch), batch["labels"], self.objective)
        return {"loss": F.cross_entropy(logits.float(), labels)}


def text_inputs(model: PreTrainedModel, batch: Batch, objective: Objective) -> dict[str, Any]:
    """Return what the model's ``forward`` takes of a batch; a causal model is told to keep no cache."""
    inputs: dict[str, Any] = model_inputs(model, batch)
    return inputs if objective == "masked" else {**inputs, "use_cache": False}


def predicted_positions(logits: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Pair each prediction with the token that it predicts.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens]; -100 where nothing is predicted.
        objective: a causal model's prediction at one position is for the next.

    Returns:
        Logits [predictions, vocabulary] and tokens [predictions].
    """
    if objective == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORED_LABEL
    return logits[keep], labels[keep]


def check_length(model: PreTrainedModel, length: int, role: str) -> None:
    """Refuse sequences that are longer than a model reads.

    Raises:
        FiftyfoldError: if they are.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise FiftyfoldError(
            f"the sequences have {length} tokens, and the {role} reads at most {longest}; lower sequence_length."
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """Refuse a tokenizer that has more tokens than the model knows.

    Raises:
        FiftyfoldError: if it has.
    """
    fit_vocabulary(copy.copy(model.config), tokenizer, role)


class _Perplexity(MeanMetric):
    """The exponential of the mean loss."""

    def compute(self) -> Tensor:
        """Return it."""
        return torch.exp(super().compute())
