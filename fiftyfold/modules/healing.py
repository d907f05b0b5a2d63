"""Healing: a compressed language model learns again to behave as the one that it was made from.

Two phases. Block by block, each block learns to give what the teacher's gives, from the inputs that the compressed
blocks before it produce, and so that the block after it does well too. Then, end to end, the whole student follows the
teacher's predictions on text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.distillation_losses import hidden_state_loss, layer_maps
from fiftyfold.modules.finite_loss import FiniteLossGuard
from fiftyfold.modules.layer_reduction import surviving_layers
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.learning_rate import learning_rate_factor, stage_at, stage_ends
from fiftyfold.modules.pretrained import Objective
from fiftyfold.modules.structure import structure_log
from fiftyfold.modules.task_module import Batch, decay_groups
from fiftyfold.modules.teacher import FrozenTeacher, Observation, observe
from fiftyfold.modules.text_module import IGNORED_LABEL, check_length, predicted_positions, text_inputs

_WORSE_THAN_GUESSING = 1.5
"""Nats a token above an even guess; no model is so bad at text of its own vocabulary."""


@dataclass(frozen=True)
class HealingLoss:
    """What the end-to-end phase minimises.

    Attributes:
        logits: weight of the divergence from the teacher's predictions.
        hidden: weight of the squared difference from the teacher's hidden states.
        labels: weight of the cross-entropy with the text itself.
        temperature: softens both predictions in the divergence.

    Raises:
        FiftyfoldError: if a weight is negative, all are zero, or the temperature is not positive.
    """

    logits: float = 1.0
    hidden: float = 0.0
    labels: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.logits, self.hidden, self.labels)
        if min(weights) < 0 or max(weights) <= 0:
            raise FiftyfoldError(f"the weights of the healing's losses cannot be negative or all zero: {self}.")
        if self.temperature <= 0:
            raise FiftyfoldError(f"temperature must be positive, not {self.temperature}.")


@dataclass(frozen=True)
class _Call:
    """What a block was called with."""

    states: Tensor
    positional: tuple[Any, ...]
    named: dict[str, Any]

    def repeat(self, block: nn.Module) -> Tensor:
        output = block(self.states, *self.positional, **self.named)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


class Healer:
    """Computes the losses of both phases.

    Args:
        student: the compressed model, or one that is to be compressed while it is healed.
        teacher: the model that it follows.
        layers: the teacher's layers that the student's were copied from; by default all.
        objective: what both were trained for.

    Raises:
        FiftyfoldError: if the two do not fit.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: FrozenTeacher,
        *,
        layers: Sequence[int] | None = None,
        objective: Objective = "causal",
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.objective: Objective = objective
        self.stack = find_layer_stack(student)
        count = len(layer_stack(student, self.stack))
        self._first_layers = list(range(teacher.num_layers)) if layers is None else list(layers)
        if len(self._first_layers) != count:
            raise FiftyfoldError(
                f"the student has {count} layers and the teacher {teacher.num_layers}; name the teacher's layers that "
                "the student's were copied from (layers=...)."
            )
        self._first_log_length = len(structure_log(student))
        self._checked_text = False
        _check_fit(student, teacher.model)

    def kept_layers(self) -> list[int]:
        """Return, for each of the student's present layers, the teacher's layer that it came from."""
        log = structure_log(self.student)[self._first_log_length :]
        return [self._first_layers[index] for index in surviving_layers(log, len(self._first_layers))]

    def end_to_end(self, batch: Batch, weights: HealingLoss) -> dict[str, Tensor]:
        """Return the unweighted losses of the end-to-end phase, and their weighted sum under ``"loss"``.

        Args:
            batch: ``input_ids`` and ``labels``, [batch, tokens]; perhaps ``attention_mask``.
            weights: which losses, and how much of each.
        """
        hidden_map = self._hidden_map() if weights.hidden > 0 else []
        wanted = self._ask_teacher(batch, hidden_map) if weights.logits > 0 or weights.hidden > 0 else None
        shown = observe(
            self.student,
            text_inputs(self.student, batch, self.objective),
            self.stack,
            hidden=None if weights.hidden > 0 else (),
            attention=(),
        )
        mask = batch.get("attention_mask")
        losses: dict[str, tuple[float, Tensor]] = {}
        if wanted is not None and weights.logits > 0:
            divergence = token_divergence(shown.logits, wanted.logits, weights.temperature, mask)
            losses["logit_loss"] = weights.logits, divergence
        if wanted is not None and weights.hidden > 0:
            difference = hidden_state_loss(list(shown.hidden.values()), wanted.hidden, hidden_map, mask)
            losses["hidden_loss"] = weights.hidden, difference
        if weights.labels > 0:
            logits, labels = predicted_positions(shown.logits, batch["labels"], self.objective)
            losses["label_loss"] = weights.labels, F.cross_entropy(logits.float(), labels)
        # Every parameter takes part even where no loss reaches it, as DistributedDataParallel demands.
        total = sum((weight * loss for weight, loss in losses.values()), shown.logits.float().sum() * 0.0)
        return {"loss": total, **{name: loss for name, (_, loss) in losses.items()}}

    def block_wise(self, batch: Batch, *, lookahead: bool = True) -> dict[str, Tensor]:
        """Return the loss of the block-wise phase under ``"loss"``.

        It is the mean, over the student's blocks, of the squared difference from the teacher's hidden state after the
        block, relative to that state's own square; with ``lookahead`` the mean of this and of the same after the
        student's next block. A block's input is what the student itself gives there, and no gradient leaves the block
        (and the next) backwards.

        Args:
            batch: ``input_ids``, [batch, tokens]; perhaps ``attention_mask``.
            lookahead: whether a block learns for the next one too.
        """
        hidden_map = self._hidden_map()
        wanted = self._ask_teacher(batch, hidden_map).hidden
        blocks = list(layer_stack(self.student, self.stack))
        calls = self._block_calls(batch, blocks)
        mask = batch.get("attention_mask")
        terms = []
        for index, block in enumerate(blocks):
            given = calls[index].repeat(block)
            losses = [relative_difference(given, wanted[hidden_map[index + 1]], mask)]
            if lookahead and index + 1 < len(blocks):
                given = replace(calls[index + 1], states=given).repeat(blocks[index + 1])
                losses.append(relative_difference(given, wanted[hidden_map[index + 2]], mask))
            terms.append(torch.stack(losses).mean())
        outside = _parameters_outside(self.student, blocks)
        idle = sum((parameter.sum() * 0.0 for parameter in outside), torch.zeros((), device=terms[0].device))
        return {"loss": torch.stack(terms).mean() + idle}

    def _hidden_map(self) -> list[int]:
        return layer_maps(self.kept_layers(), self.teacher.num_layers)[1]

    def _ask_teacher(self, batch: Batch, hidden: Sequence[int]) -> Observation:
        answer = self.teacher(text_inputs(self.teacher.model, batch, self.objective), hidden=hidden)
        if not self._checked_text:
            self._checked_text = True
            _check_text(answer.logits, batch, self.objective)
        return answer

    @torch.no_grad()
    def _block_calls(self, batch: Batch, blocks: Sequence[nn.Module]) -> list[_Call]:
        """Return what each block is called with in the student's forward pass."""
        calls: list[_Call] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls.append(_Call(args[0] if args else kwargs["hidden_states"], args[1:], named))

        with ExitStack() as hooks:
            for block in blocks:
                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            self.student(**text_inputs(self.student, batch, self.objective))
        return calls


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Tensor,
    *,
    steps: int,
    block_steps: int = 0,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    loss: HealingLoss | None = None,
    lookahead: bool = True,
    layers: Sequence[int] | None = None,
    labels: Tensor | None = None,
    objective: Objective = "causal",
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Heal a compressed language model in place, in a plain loop with AdamW and clipped gradients.

    What trains is every parameter that asks for gradients; freeze the rest first where only factors are to learn. Each
    phase has a learning rate that rises and falls. For resumable training use ``HealingModule``.

    Args:
        student: the compressed model.
        teacher: the model that it was made from; frozen in place, and brought to the student's device.
        sequences: text to heal on, [sequences, tokens], on any device.
        steps: optimizer steps of the end-to-end phase.
        block_steps: optimizer steps of the block-wise phase before it.
        batch_size: sequences a step.
        learning_rate: the highest of each phase.
        weight_decay: decay of matrices.
        warmup: share of each phase over which the learning rate rises.
        loss: the end-to-end phase's losses; by default the divergence from the teacher's predictions.
        lookahead: whether a block learns for the next one too.
        layers: the teacher's layers that the student's were copied from; by default all.
        labels: what a masked model must fill in, as ``sequences``; a causal model needs none.
        objective: ``"causal"`` or ``"masked"``.
        seed: fixes the order of the sequences.
        progress: told the step and its loss.

    Returns:
        The loss of every step.

    Raises:
        FiftyfoldError: if the models or the text do not fit, or a loss is not finite.
    """
    if steps < 0 or block_steps < 0 or steps + block_steps < 1:
        raise FiftyfoldError("healing needs at least one step.")
    if batch_size < 1:
        raise FiftyfoldError(f"batch_size is {batch_size}; healing needs at least one sequence a step.")
    if sequences.dim() != 2 or len(sequences) == 0:
        raise FiftyfoldError("healing needs text: sequences of one length, at least one.")
    check_length(student, sequences.shape[1], "student")
    _check_tokens(sequences, teacher)
    healer = Healer(student, FrozenTeacher(teacher), layers=layers, objective=objective)
    targets, weights, guard = sequences if labels is None else labels, loss or HealingLoss(), FiniteLossGuard()
    ends = stage_ends([phase for phase in (block_steps, steps) if phase], block_steps + steps)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise FiftyfoldError("nothing of the student trains: no parameter asks for gradients (requires_grad_).")
    optimizer = torch.optim.AdamW(decay_groups(student, weight_decay), lr=learning_rate, fused=True)
    student.train()
    device = next(student.parameters()).device
    losses = []
    for step, rows in enumerate(_batches(len(sequences), batch_size, block_steps + steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step + 1, ends, warmup)
        batch = {"input_ids": sequences[rows].to(device), "labels": targets[rows].to(device)}
        in_blocks = block_steps > 0 and stage_at(step, ends) == 0
        parts = healer.block_wise(batch, lookahead=lookahead) if in_blocks else healer.end_to_end(batch, weights)
        guard.note(parts["loss"], step)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts["loss"].detach()))
        progress(step, losses[-1])
    guard.check()
    student.eval()
    return losses


def _check_tokens(sequences: Tensor, model: PreTrainedModel) -> None:
    known = model.get_input_embeddings().num_embeddings
    if sequences.is_floating_point() or sequences.dtype == torch.bool:
        raise FiftyfoldError(f"the sequences hold numbers of {sequences.dtype}; tokens are integers.")
    if not 0 <= int(sequences.min()) <= int(sequences.max()) < known:
        raise FiftyfoldError(
            f"the sequences have tokens from {int(sequences.min())} to {int(sequences.max())}, the model knows 0 to "
            f"{known - 1}; is the text of another vocabulary?"
        )


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the student's predictions from the teacher's, in nats a token.

    At another temperature T the result is multiplied by T², which keeps the size of the gradients.

    Args:
        student_logits: [batch, tokens, vocabulary].
        teacher_logits: the same shape; no gradient flows into it.
        temperature: divides both logits.
        mask: [batch, tokens], 1 for the tokens that count; None for all.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    kept = divergence.mean() if mask is None else divergence[mask.bool()].mean()
    return kept * temperature**2


def relative_difference(given: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared difference of two hidden states [batch, tokens, hidden], relative to the second's square."""
    given, wanted = given.float(), wanted.detach().float()
    if mask is not None:
        given, wanted = given[mask.bool()], wanted[mask.bool()]
    return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def _parameters_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [p for p in model.parameters() if id(p) not in inside and p.requires_grad]


def _batches(count: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


def _check_fit(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for what, key in (("vocabulary size", "vocab_size"), ("hidden size", "hidden_size")):
        mine, wanted = getattr(student.config, key, None), getattr(teacher.config, key, None)
        if mine != wanted:
            raise FiftyfoldError(f"the student's {what} is {mine}, the teacher's {wanted}; use models that agree.")


def _check_text(logits: Tensor, batch: Batch, objective: Objective) -> None:
    """Refuse text of another vocabulary: its token numbers mean other words to the teacher."""
    predictions, labels = predicted_positions(logits, batch["labels"], objective)
    if len(labels) == 0:
        return
    nats = float(F.cross_entropy(predictions.float(), labels, ignore_index=IGNORED_LABEL))
    guess = math.log(logits.shape[-1])
    if nats > guess + _WORSE_THAN_GUESSING:
        raise FiftyfoldError(
            f"the teacher predicts this text worse than an even guess ({nats:.1f} nats a token against {guess:.1f}); "
            "use the tokenizer that belongs to the teacher."
        )
