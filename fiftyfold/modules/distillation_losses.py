"""The losses of XTC's distillation, and which teacher layer each student layer follows (XTC, section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError

Layers = Sequence[Tensor] | Mapping[int, Tensor]
"""One tensor for each layer that counts, found by the layer's index."""


def layer_maps(layers: Sequence[int], teacher_layers: int) -> tuple[list[int], list[int]]:
    """Say which of the teacher's attention layers and hidden states the student's follow.

    Student layer i was copied from teacher layer ``layers[i]`` and follows its attention scores and its output. The
    student's embedding output follows what entered the teacher's first kept layer: the teacher's embedding output if
    that is layer 0 or 1, else the output of the layer ``layers[0] - 1`` minus one. In XTC's code the map is
    ``[layers[0] - 1] + [layer + 1 for layer in layers]``, so that with [2, 4, 6, 8, 10] the embedding output, though
    copied, is drawn to the hidden state after layer 0. That is kept. For layer 0 the formula would give -1, the last
    hidden state; here it is the embedding output.

    Args:
        layers: rising indices of the teacher's layers.
        teacher_layers: number of the teacher's layers.

    Returns:
        For each student layer the teacher's attention layer, counted from 0; and for each of the student's hidden
        states (embedding output first) the teacher's, counted in the same way.

    Raises:
        FiftyfoldError: if an index does not exist or the list does not rise.
    """
    chosen = list(layers)
    rising = all(first < second for first, second in pairwise(chosen))
    if not chosen or not rising or chosen[0] < 0 or chosen[-1] >= teacher_layers:
        raise FiftyfoldError(
            f"the layers {chosen} must be rising indices of the teacher's {teacher_layers}, 0 to {teacher_layers - 1}."
        )
    return chosen, [max(chosen[0] - 1, 0), *(layer + 1 for layer in chosen)]


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compare two predictions by cross-entropy.

    The mean goes over batch *and* classes, as in XTC's code: the usual cross-entropy divided by the number of classes,
    which matters for its balance with the other losses. At another temperature T the result is multiplied by T², which
    keeps the size of the gradients (Hinton et al. 2015).

    Args:
        student_logits: [..., classes].
        teacher_logits: the same shape; no gradient flows into it.
        temperature: divides both logits.

    Returns:
        A scalar in float32 (float64 for such logits).
    """
    student, teacher = _upcast(student_logits) / temperature, _upcast(teacher_logits.detach()) / temperature
    return -(F.softmax(teacher, dim=-1) * F.log_softmax(student, dim=-1)).mean() * temperature**2


def hard_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compare a prediction with true classes, in the measure of :func:`soft_cross_entropy`.

    It is what ``soft_cross_entropy`` gives at temperature 1 for a teacher that is certain of the label: the usual
    cross-entropy divided by the number of classes.
    """
    return F.cross_entropy(_upcast(logits), labels) / logits.shape[-1]


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare two tensors of one shape by the mean of the squared difference (the logits of a regression)."""
    return F.mse_loss(_upcast(student), _upcast(teacher.detach()))


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Layers, layer_map: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Sum, over the student's hidden states, the mean squared difference from the teacher's.

    Args:
        student: the embedding output and every layer's, each [batch, tokens, hidden].
        teacher: the teacher's by index, the same shapes.
        layer_map: for each of the student's the index of the teacher's; see :func:`layer_maps`.
        mask: [batch, tokens], true or 1 for real tokens; the mean then goes over those alone. None counts padding, as
            XTC's code does.

    Returns:
        A scalar in float32.
    """
    _check_lengths("hidden states", student, teacher, layer_map)
    keep = None if mask is None else mask.bool().unsqueeze(-1)
    return _summed_differences(student, teacher, layer_map, keep)


def attention_score_loss(
    student: Sequence[Tensor],
    teacher: Layers,
    layer_map: Sequence[int],
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Sum, over the student's layers, the mean squared difference of the attention scores before the softmax.

    Args:
        student: every layer's scores, [batch, heads, queries, keys], without any mask added.
        teacher: the teacher's by index, the same shapes.
        layer_map: for each of the student's layers the index of the teacher's.
        mask: [batch, tokens], true or 1 for real tokens; the mean then goes over pairs of a real query and a real key.
            None counts all pairs, as XTC's code does.
        causal: together with a mask, leave out keys that come after their query.

    Returns:
        A scalar in float32.
    """
    _check_lengths("attention scores", student, teacher, layer_map)
    return _summed_differences(student, teacher, layer_map, None if mask is None else _pairs(mask.bool(), causal))


def _pairs(real: Tensor, causal: bool) -> Tensor:
    pairs = real[:, None, :, None] & real[:, None, None, :]
    return pairs & torch.ones_like(pairs[:1]).tril() if causal else pairs


def _summed_differences(
    student: Sequence[Tensor], teacher: Layers, layer_map: Sequence[int], keep: Tensor | None
) -> Tensor:
    terms = [
        _mean_squared_difference(mine, teacher[index], keep) for mine, index in zip(student, layer_map, strict=True)
    ]
    return torch.stack(terms).sum()


def _mean_squared_difference(student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
    student, teacher = _upcast(student), _upcast(teacher.detach())
    if keep is None:
        return F.mse_loss(student, teacher)
    # keep lacks one dimension of size > 1 (hidden width or heads); every kept entry stands for that many.
    count = keep.sum() * (student.numel() // keep.numel())
    squares: Tensor = _MaskedSquares.apply(student, teacher, keep)
    return squares / count.clamp(min=1)


class _MaskedSquares(torch.autograd.Function):
    """Sum of the squared differences at the kept entries.

    Attention scores are the largest tensors of a step. This passes over them half as often as the same in single
    operations, and keeps one of them.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        # The difference is set to zero, not multiplied by it: whatever stands in the padding, even an infinity, reaches
        # neither the loss nor its gradient.
        difference = (student - teacher).masked_fill_(~keep, 0.0)
        ctx.save_for_backward(difference)
        norm: Tensor = torch.linalg.vector_norm(difference)
        return norm.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradient), None, None


def _check_lengths(what: str, student: Sequence[Tensor], teacher: Layers, layer_map: Sequence[int]) -> None:
    if len(student) != len(layer_map):
        raise FiftyfoldError(f"the student gave {len(student)} {what}, the layer map has {len(layer_map)} entries.")
    known = teacher if isinstance(teacher, Mapping) else range(len(teacher))
    missing = [index for index in layer_map if index not in known]
    if missing:
        raise FiftyfoldError(f"the layer map names number {missing[0]} of the teacher's {what}, which is not there.")
    for mine, index in zip(student, layer_map, strict=True):
        if mine.shape != teacher[index].shape:
            raise FiftyfoldError(
                f"the student's {what} have the shape {list(mine.shape)}, the teacher's {list(teacher[index].shape)}; "
                "the two models must agree in width and heads."
            )


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
