"""Distillation as XTC does it: a student follows its teacher's logits, hidden states and attention scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.attention_scores import has_causal_attention
from fiftyfold.modules.distillation_losses import (
    attention_score_loss,
    hard_cross_entropy,
    hidden_state_loss,
    layer_maps,
    mean_squared_error,
    soft_cross_entropy,
)
from fiftyfold.modules.dropout import set_dropout
from fiftyfold.modules.fine_tuning import load_student, load_teacher
from fiftyfold.modules.layer_reduction import choose_layers, student_from_teacher, surviving_layers
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.structure import attach_structure, structure_log
from fiftyfold.modules.task_module import Batch, TaskModule, label_loss, model_inputs, true_labels
from fiftyfold.modules.teacher import Observation, TeacherPrecision, freeze, observe


@dataclass(frozen=True)
class Stage:
    """One part of a distillation, with a learning-rate schedule of its own.

    Attributes:
        attention: weight of the loss on attention scores.
        hidden: weight of the loss on hidden states.
        logits: weight of the loss on the predictions.
        share: how much of the training the stage gets, in proportion to the others.
    """

    attention: float = 1.0
    hidden: float = 1.0
    logits: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.attention, self.hidden, self.logits)
        if min(weights) < 0 or max(weights) <= 0:
            raise FiftyfoldError(f"a stage's weights cannot be negative or all zero: {self}.")


_INNER, _ALL, _LOGITS = Stage(logits=0.0), Stage(), Stage(attention=0.0, hidden=0.0)
_NAMED_STAGES: dict[int, tuple[Stage, ...]] = {1: (_ALL,), 2: (_INNER, _LOGITS), 3: (_INNER, _ALL, _LOGITS)}


class DistillationModule(TaskModule):
    """Trains a student to behave like its teacher, inside and out.

    The loss of XTC's code (section 2 of the paper) is the sum of the soft cross-entropy of the logits (mean squared
    error for a regression), the mean squared differences of the hidden states, and those of the attention scores before
    the softmax. The teacher is frozen, always in evaluation mode, and no part of checkpoints, ``parameters()`` or
    DistributedDataParallel.

    A stage's part of zero weight is not computed; a teacher whom no part needs is not run.

    Args:
        teacher: a fine-tuned classifier: a folder, a hub id, or a model. A model is frozen in place, and is not stored:
            ``load_from_checkpoint`` then needs it as ``teacher=``.
        student: a folder or hub id to begin from, e.g. a student of an earlier distillation or an exported folder; by
            default a copy of the teacher.
        layers: which of the teacher's layers the student has: ``"all"``, ``"every-other"``, ``"first"``, ``"last"`` or
            a list of indices from 0. It is also what maps the losses, so name it for a ``student`` too.
        keep: how many layers, for the named choices; half of them by default.
        stages: 1 (all losses together, XTC's way), 2 (attention and hidden states, then logits), 3 (the same with all
            losses in between), or a list of stages.
        attention_weight: further weight of the loss on attention scores, in every stage.
        hidden_weight: the same for the hidden states.
        logit_weight: the same for the predictions.
        hard_label_share: share of the true labels in the loss on the predictions, 0 to 1; XTC has none.
        temperature: softens both predictions.
        dropout: of the student while it trains; None keeps its own. A student of few bits rarely fits its teacher too
            closely, and matches it better without.
        mask_padding: leave padding out of the losses on hidden states and attention scores (and, in a decoder, keys
            after their query). XTC's code counts it.
        teacher_precision: ``"8bit"`` and ``"4bit"`` hold the teacher in bitsandbytes' formats.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices; biases and normalisation weights have none.
        warmup: share of each stage over which the learning rate rises before it falls to zero; XTC has one epoch.

    Raises:
        FiftyfoldError: if a model cannot be loaded, the two do not fit, or an argument makes no sense.
    """

    def __init__(
        self,
        teacher: str | PreTrainedModel,
        student: str | None = None,
        *,
        layers: str | list[int] = "all",
        keep: int | None = None,
        stages: int | list[Stage] = 1,
        attention_weight: float = 1.0,
        hidden_weight: float = 1.0,
        logit_weight: float = 1.0,
        hard_label_share: float = 0.0,
        temperature: float = 1.0,
        dropout: float | None = None,
        mask_padding: bool = True,
        teacher_precision: TeacherPrecision = "full",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-5),
        weight_decay: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(optimizer, weight_decay, warmup)
        self._stages = _weighted_stages(stages, attention_weight, hidden_weight, logit_weight)
        self._stage_shares = [stage.share for stage in self._stages]
        if not 0 <= hard_label_share <= 1:
            raise FiftyfoldError(f"hard_label_share is a share, 0 to 1, not {hard_label_share}.")
        if temperature <= 0:
            raise FiftyfoldError(f"temperature must be positive, not {temperature}.")
        self._hard_label_share = hard_label_share
        self._temperature = temperature
        self._mask_padding = mask_padding
        unstored = [] if isinstance(teacher, str) else ["teacher"]
        self.save_hyperparameters(ignore=unstored)
        self.save_hyperparameters(ignore=[*unstored, *self._unstorable_hyperparameters()])
        if not isinstance(stages, int):
            self.hparams["stages"] = [asdict(stage) for stage in _listed(stages)]

        teacher_model = load_teacher(teacher) if isinstance(teacher, str) else teacher
        total = len(layer_stack(teacher_model, find_layer_stack(teacher_model)))
        if layers == "all" and keep is not None:
            raise FiftyfoldError(f"keep={keep} goes with layers='every-other', 'first' or 'last'; name one of them.")
        self._first_layers = list(range(total)) if layers == "all" else choose_layers(layers, total, keep)
        self.student = (
            student_from_teacher(teacher_model, self._first_layers).float()
            if student is None
            else load_student(student, "student")
        )
        _check_fit(self.student, teacher_model, self._first_layers, self._stages)
        if dropout is not None:
            set_dropout(self.student, dropout)
        attach_structure(self.student)
        self._first_log_length = len(structure_log(self.student))
        self._student_stack = find_layer_stack(self.student)
        self._causal = has_causal_attention(self.student)
        self._teacher = freeze(teacher_model, teacher_precision, shared=not isinstance(teacher, str))

    @property
    def trained_model(self) -> PreTrainedModel:
        """The student."""
        return self.student

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher; on the device of the last batch that it saw."""
        return self._teacher.model

    def kept_layers(self) -> list[int]:
        """Return, for each of the student's present layers, the teacher's layer that it came from.

        Layers that a callback dropped in the course of training are not among them.
        """
        log = structure_log(self.student)[self._first_log_length :]
        return [self._first_layers[index] for index in surviving_layers(log, len(self._first_layers))]

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the stage's losses, unweighted, and their weighted sum under ``"loss"``."""
        stage = self._stages[self.current_stage()]
        attention_map, hidden_map = layer_maps(self.kept_layers(), self._teacher.num_layers)
        wanted = self._ask_teacher(stage, batch, hidden_map, attention_map)
        shown = observe(
            self.student,
            model_inputs(self.student, batch),
            self._student_stack,
            hidden=None if stage.hidden > 0 else (),
            attention=None if stage.attention > 0 else (),
        )
        mask = batch.get("attention_mask") if self._mask_padding else None
        losses: dict[str, Tensor] = {}
        # Every parameter takes part even where no loss reaches it (the classifier, in a stage without logits), as
        # DistributedDataParallel demands.
        total = shown.logits.float().sum() * 0.0
        if wanted is not None and stage.attention > 0:
            scores = list(shown.attention.values())
            losses["attention_loss"] = attention_score_loss(
                scores, wanted.attention, attention_map, mask, causal=self._causal
            )
            total = total + stage.attention * losses["attention_loss"]
        if wanted is not None and stage.hidden > 0:
            losses["hidden_loss"] = hidden_state_loss(list(shown.hidden.values()), wanted.hidden, hidden_map, mask)
            total = total + stage.hidden * losses["hidden_loss"]
        for share, name, loss in self._prediction_losses(stage, shown.logits, wanted, batch):
            losses[name] = loss
            total = total + stage.logits * share * loss
        return {"loss": total, **losses}

    def _fitted_models(self) -> list[tuple[PreTrainedModel, str]]:
        return [(self._teacher.model, "teacher"), (self.student, "student")]

    def _ask_teacher(
        self, stage: Stage, batch: Batch, hidden_map: list[int], attention_map: list[int]
    ) -> Observation | None:
        soft_labels = stage.logits > 0 and self._hard_label_share < 1
        if not (soft_labels or stage.attention > 0 or stage.hidden > 0):
            return None
        return self._teacher(
            model_inputs(self._teacher.model, batch),
            hidden=hidden_map if stage.hidden > 0 else (),
            attention=attention_map if stage.attention > 0 else (),
        )

    def _prediction_losses(
        self, stage: Stage, logits: Tensor, wanted: Observation | None, batch: Batch
    ) -> Iterator[tuple[float, str, Tensor]]:
        hard, regression = self._hard_label_share, logits.shape[-1] == 1
        if stage.logits > 0 and hard < 1 and wanted is not None:
            if regression:
                yield 1 - hard, "logit_loss", mean_squared_error(logits, wanted.logits)
            else:
                yield 1 - hard, "logit_loss", soft_cross_entropy(logits, wanted.logits, self._temperature)
        if stage.logits > 0 and hard > 0:
            labels = true_labels(batch)
            yield hard, "label_loss", label_loss(logits, labels) if regression else hard_cross_entropy(logits, labels)


def _weighted_stages(
    stages: int | Sequence[Stage | Mapping[str, float]], attention: float, hidden: float, logits: float
) -> list[Stage]:
    if isinstance(stages, int):
        if stages not in _NAMED_STAGES:
            raise FiftyfoldError(f"there is distillation in 1, 2 or 3 stages, or in a list of stages; not {stages}.")
        stages = _NAMED_STAGES[stages]
    return [
        Stage(stage.attention * attention, stage.hidden * hidden, stage.logits * logits, stage.share)
        for stage in _listed(stages)
    ]


def _listed(stages: Sequence[Stage | Mapping[str, float]]) -> list[Stage]:
    # A checkpoint's hyperparameters hold them as mappings.
    return [stage if isinstance(stage, Stage) else Stage(**stage) for stage in stages]


def _check_fit(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int], stages: Sequence[Stage]
) -> None:
    have = len(layer_stack(student, find_layer_stack(student)))
    if have != len(layers):
        raise FiftyfoldError(
            f"the student has {have} layers, but layers={list(layers)} names {len(layers)} of the teacher's; "
            "name the teacher's layers that the student's were copied from."
        )
    pairs = [("vocabulary size", "vocab_size"), ("number of labels", "num_labels")]
    if any(stage.hidden > 0 for stage in stages):
        pairs.append(("hidden size", "hidden_size"))
    if any(stage.attention > 0 for stage in stages):
        pairs.append(("number of attention heads", "num_attention_heads"))
    for what, key in pairs:
        mine, wanted = getattr(student.config, key, None), getattr(teacher.config, key, None)
        if mine != wanted:
            raise FiftyfoldError(f"the student's {what} is {mine}, the teacher's {wanted}; use models that agree.")
