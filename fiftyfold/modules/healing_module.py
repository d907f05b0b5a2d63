"""HealingModule: a compressed language model follows its teacher on text, under a Trainer."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.healing import Healer, HealingLoss
from fiftyfold.modules.layer_reduction import choose_layers, student_from_teacher
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.pretrained import (
    Objective,
    load_language_model,
    load_trainable_language_model,
)
from fiftyfold.modules.structure import attach_structure
from fiftyfold.modules.task_module import Batch
from fiftyfold.modules.teacher import TeacherPrecision, freeze
from fiftyfold.modules.text_module import TextModule


class HealingModule(TextModule):
    """Trains a compressed language model to behave like the one that it was made from.

    The student begins as a copy of the teacher, and callbacks compress it (``TensorNetworkDecomposition``,
    ``LayerReduction``, ``QuantizationAwareTraining``); or it is a folder that was compressed before. The first
    ``block_share`` of the training heals block by block, the rest end to end; see :mod:`fiftyfold.modules.healing`. The
    teacher is frozen, always in evaluation mode, and no part of checkpoints, ``parameters()`` or
    DistributedDataParallel.

    Args:
        teacher: the original language model: a folder, a hub id, or a model. A model is frozen in place, and is not
            stored: ``load_from_checkpoint`` then needs it as ``teacher=``.
        student: a folder or hub id to begin from; by default a copy of the teacher.
        objective: ``"causal"`` or ``"masked"``.
        layers: which of the teacher's layers the student has: ``"all"``, ``"every-other"``, ``"first"``, ``"last"`` or
            a list of indices from 0.
        keep: how many layers, for the named choices; half of them by default.
        logit_weight: weight of the divergence from the teacher's predictions.
        hidden_weight: weight of the squared difference from the teacher's hidden states.
        label_weight: weight of the cross-entropy with the text itself.
        temperature: softens both predictions.
        block_share: share of the training that heals block by block, at least 0 and below 1.
        lookahead: whether a block learns for the next one too.
        teacher_precision: ``"8bit"`` and ``"4bit"`` hold the teacher in bitsandbytes' formats.
        optimizer: makes the optimizer from parameter groups.
        weight_decay: decay of the weight matrices; biases and normalisation weights have none.
        warmup: share of each phase over which the learning rate rises before it falls to zero.

    Raises:
        FiftyfoldError: if a model cannot be loaded, the two do not fit, or an argument makes no sense.
    """

    def __init__(
        self,
        teacher: str | PreTrainedModel,
        student: str | None = None,
        *,
        objective: Objective = "causal",
        layers: str | list[int] = "all",
        keep: int | None = None,
        logit_weight: float = 1.0,
        hidden_weight: float = 0.0,
        label_weight: float = 0.0,
        temperature: float = 1.0,
        block_share: float = 0.0,
        lookahead: bool = True,
        teacher_precision: TeacherPrecision = "full",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        weight_decay: float = 0.0,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(objective, optimizer, weight_decay, warmup)
        self._loss = HealingLoss(logit_weight, hidden_weight, label_weight, temperature)
        self._stage_shares = stage_shares(block_share)
        self._lookahead = lookahead
        unstored = [] if isinstance(teacher, str) else ["teacher"]
        self.save_hyperparameters(ignore=unstored)
        self.save_hyperparameters(ignore=[*unstored, *self._unstorable_hyperparameters()])
        model = load_language_model(teacher, "teacher", objective) if isinstance(teacher, str) else teacher
        total = len(layer_stack(model, find_layer_stack(model)))
        kept = list(range(total)) if layers == "all" else choose_layers(layers, total, keep)
        self.student = (
            student_from_teacher(model, kept).float()
            if student is None
            else load_trainable_language_model(student, "student", objective)
        )
        attach_structure(self.student)
        frozen = freeze(model, teacher_precision, shared=not isinstance(teacher, str))
        self._healer = Healer(self.student, frozen, layers=kept, objective=objective)

    @property
    def trained_model(self) -> PreTrainedModel:
        """The student."""
        return self.student

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher; on the device of the last batch that it saw."""
        return self._healer.teacher.model

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the phase's losses, unweighted, and their weighted sum under ``"loss"``."""
        if len(self._stage_shares) == 2 and self.current_stage() == 0:
            return self._healer.block_wise(batch, lookahead=self._lookahead)
        return self._healer.end_to_end(batch, self._loss)

    def _fitted_models(self) -> list[tuple[PreTrainedModel, str]]:
        return [(self.teacher, "teacher"), (self.student, "student")]


def stage_shares(block_share: float) -> list[float]:
    """Return the shares of the training that heal block by block, if any does, and end to end.

    Raises:
        FiftyfoldError: if they are none.
    """
    if not 0 <= block_share < 1:
        raise FiftyfoldError(f"block_share is a share of the training, at least 0 and below 1, not {block_share}.")
    return [block_share, 1 - block_share] if block_share else [1.0]
