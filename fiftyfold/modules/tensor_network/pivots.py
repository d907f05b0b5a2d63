"""The rows of identity blocks, as a fixed gauge keeps them: their numbers in files, signs in training.

Training loops average a model's buffers, cast them and send them between processes, and no integer outlives all of
that: an exponential average of equal integers is cut off below them, a mean of them is an error on a GPU, 16-bit ones
are not sent. In training each binary digit of a number is +1 or -1 instead, whose sign no average of equal values and
no cast changes.
"""

from __future__ import annotations

import torch

from fiftyfold.modules.tensor_network.form import NetworkForm

PIVOTS = "pivots"
"""Name of the buffer of a network whose gauge is fixed: the rows of all identity blocks, one block after another."""


def row_signs(rows: torch.Tensor, form: NetworkForm, dtype: torch.dtype) -> torch.Tensor:
    """Return row numbers as training holds them.

    Args:
        rows: (n,) integers.
        form: of the network that they belong to.
        dtype: a floating-point type.

    Returns:
        (n, :attr:`.NetworkForm.pivot_bits`) of +1 and -1, the lowest digit first.
    """
    digits = rows.long().unsqueeze(1) >> torch.arange(form.pivot_bits, device=rows.device) & 1
    return (2 * digits - 1).to(dtype)


def row_numbers(held: torch.Tensor) -> torch.Tensor:
    """Return the row numbers that a buffer holds, (n,) integers; those of a file are themselves.

    Args:
        held: from :func:`row_signs`, perhaps averaged or cast since, or integers.
    """
    if not held.is_floating_point():
        return held
    return ((held > 0).long() << torch.arange(held.shape[1], device=held.device)).sum(dim=1)


def stored_rows(held: torch.Tensor, form: NetworkForm) -> torch.Tensor:
    """Return the row numbers that a buffer holds in the type in which a file does."""
    return row_numbers(held).to(stored_type(form))


def stored_type(form: NetworkForm) -> torch.dtype:
    """Return the type in which a file holds row numbers."""
    return torch.int16 if form.pivot_bytes == 2 else torch.int32


def held_alike(given: torch.Tensor, held: torch.Tensor, form: NetworkForm) -> torch.Tensor:
    """Return what was saved from a buffer of row numbers in the way in which another holds them.

    Args:
        given: of a file or a training, of this version or an earlier one, which trained with integers.
        held: the buffer that is to take it.
        form: of the network of both.
    """
    if given.dim() != (2 if given.is_floating_point() else 1):
        return given  # of neither way: loading tells the shapes
    if not held.is_floating_point():
        return row_numbers(given).to(held.dtype)
    return given if given.is_floating_point() else row_signs(given, form, held.dtype)
