"""Layer reduction: a student made of some of its teacher's layers (XTC, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.layer_stack import check_layers, find_layer_stack, keep_layers, layer_stack
from fiftyfold.modules.structure import Operation, adopt_log, apply_operation, has_structure, register_operation

OPERATION = "reduce_layers"
"""Kind of a log's entry, for reduction and for pruning alike."""

_Model = TypeVar("_Model", bound=nn.Module)


def choose_layers(layers: str | Sequence[int], total: int, keep: int | None = None) -> list[int]:
    """Choose which of ``total`` layers stay.

    Args:
        layers: ``"every-other"`` (equal steps, centred, as XTC does: 12 → 6 gives 1, 3, 5, 7, 9, 11 and 12 → 5 gives
            2, 4, 6, 8, 10), ``"first"``, ``"last"``, or the indices themselves, counted from 0.
        total: number of layers there are.
        keep: number of layers that stay, for the named choices; half of them by default.

    Returns:
        Rising indices.

    Raises:
        FiftyfoldError: if the choice is unknown or impossible.
    """
    if not isinstance(layers, str):
        chosen = list(layers)
        if keep is not None and keep != len(chosen):
            raise FiftyfoldError(f"keep={keep} contradicts the list of {len(chosen)} layers; leave keep out.")
        check_layers(chosen, total)
        return chosen
    keep = max(1, total // 2) if keep is None else keep
    if not 1 <= keep <= total:
        raise FiftyfoldError(f"cannot keep {keep} of {total} layers; keep 1 to {total}.")
    if layers == "first":
        return list(range(keep))
    if layers == "last":
        return list(range(total - keep, total))
    if layers == "every-other":
        return _spread(total, keep)
    raise FiftyfoldError(f"unknown choice of layers {layers!r}; use 'every-other', 'first', 'last' or a list.")


def reduce_layers(
    model: nn.Module,
    layers: str | Sequence[int] = "every-other",
    keep: int | None = None,
    *,
    step: int = 0,
    optimizer: Optimizer | None = None,
) -> list[int]:
    """Keep some layers of ``model`` in place, and record it in its structure log.

    Embeddings, pooler and head stay as they are. ``layer_idx`` attributes and the transformers configuration are
    mended; the configuration becomes a new object, so that models that share the old one are not affected.

    Args:
        model: any module with a stack of layers.
        layers: see :func:`choose_layers`.
        keep: see :func:`choose_layers`.
        step: optimizer step at which this happens, for the log.
        optimizer: the optimizer that trains ``model``, if there is one; dropped parameters leave it.

    Returns:
        The indices of the layers that stayed.

    Raises:
        FiftyfoldError: if the stack is not found or the choice is impossible.
    """
    operation = reduction(model, layers, keep, step=step)
    apply_operation(model, operation, () if optimizer is None else (optimizer,))
    return list(operation["layers"])


def reduction(
    model: nn.Module, layers: str | Sequence[int] = "every-other", keep: int | None = None, *, step: int = 0
) -> Operation:
    """Return the log's entry for :func:`reduce_layers` on ``model``, without carrying it out."""
    stack = find_layer_stack(model)
    total = len(layer_stack(model, stack))
    return {"op": OPERATION, "stack": stack, "layers": choose_layers(layers, total, keep), "of": total, "step": step}


def student_from_teacher(teacher: _Model, layers: Sequence[int]) -> _Model:
    """Copy ``teacher`` with only some of its layers, all of it ready to train.

    Nothing is logged, and what the teacher's log says stays with the teacher: the student is complete as its
    configuration says.

    Args:
        teacher: a model with a stack of layers; not changed.
        layers: rising indices of the teacher's layers, counted from 0.

    Returns:
        A new model in training mode whose layer i is a copy of teacher layer ``layers[i]``.

    Raises:
        FiftyfoldError: if the stack is not found, the list is impossible, or the teacher's weights are packed.
    """
    if not all(parameter.is_floating_point() for parameter in teacher.parameters()):
        raise FiftyfoldError(
            "a student cannot be copied from a teacher with packed weights; name the model that the teacher was made "
            "from, or a student to begin from (student=...)."
        )
    student = copy.deepcopy(teacher)
    keep_layers(student, find_layer_stack(student), layers)
    if has_structure(student):
        adopt_log(student, [])
    student.requires_grad_(True)
    return student.train()


def surviving_layers(log: Iterable[Operation], total: int) -> list[int]:
    """Compose a log's reductions: which of the ``total`` layers at the beginning are still there.

    Args:
        log: a structure log.
        total: number of layers before the log's first entry.

    Returns:
        For each layer that is left, its index at the beginning.
    """
    alive = list(range(total))
    for operation in log:
        if operation["op"] == OPERATION:
            alive = [alive[index] for index in operation["layers"]]
    return alive


def _spread(total: int, keep: int) -> list[int]:
    step = total // keep
    if step > 1:
        start = step - 1 + (total - step * keep) // 2
        return list(range(start, start + step * keep, step))
    # Fewer than every other layer goes: equal steps would take them all from the two ends.
    return [(position + 1) * total // keep - 1 for position in range(keep)]


def _replay(model: nn.Module, operation: Operation) -> None:
    try:
        stack, layers, expected = str(operation["stack"]), list(operation["layers"]), operation["of"]
    except (KeyError, TypeError) as error:
        raise FiftyfoldError("the log's entry 'reduce_layers' cannot be read; the file is corrupt.") from error
    total = len(layer_stack(model, stack))
    if total != expected:
        raise FiftyfoldError(
            f"the structure log drops layers from {expected}, but the model has {total}; "
            "build the model as it was when its training began."
        )
    keep_layers(model, stack, layers)


register_operation(OPERATION, _replay)
