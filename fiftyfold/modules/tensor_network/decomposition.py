"""Sequential truncated singular value decompositions: from a matrix to the cores of a matrix product operator.

TensorLy cuts the matrix (``tensor_train_matrix``, the tensor train of Oseledets, 2011). It is always told the ranks as
integers, because its fractions of parameters are not met, and in at least float32, because it has no half precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.form import NetworkForm, Term
from fiftyfold.modules.tensor_network.subspace import iteration_pays, leading_directions

Cores = list[torch.Tensor]
"""The cores of one term, each (left bond, outputs, inputs, right bond)."""


def decompose(matrix: torch.Tensor, form: NetworkForm) -> list[Cores]:
    """Return the cores of each term of ``form`` that stand nearest to ``matrix``, term after term.

    Each term takes what the terms before it have left. Within a term the cores come from sequential singular value
    decompositions, of which each keeps the largest singular values; between two cores the norms are balanced.

    Args:
        matrix: (outputs, inputs), of any floating-point type; computed in float32, or in float64 if it is that.
        form: of that shape.

    Returns:
        In the type that was computed in.

    Raises:
        FiftyfoldError: if the matrix has another shape, has entries that are not finite, or memory runs out.
    """
    if tuple(matrix.shape) != form.shape:
        raise FiftyfoldError(f"the matrix has shape {tuple(matrix.shape)}, and the tensor network {form.shape}.")
    check_finite(matrix)
    rest = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    networks = []
    try:
        for term in form.terms:
            cores = balanced(tensor_train(rest, term))
            networks.append(cores)
            if len(form.terms) > 1:
                rest = rest - rebuild(cores)[: rest.shape[0], : rest.shape[1]]
    except (MemoryError, RuntimeError) as error:
        raise as_memory_error(error, form.shape) from error
    return networks


def tensor_train(matrix: torch.Tensor, term: Term) -> Cores:
    """Return the cores of one term by sequential truncated singular value decompositions.

    All but the last have orthonormal columns.

    Args:
        matrix: (outputs, inputs), float32 or float64; zeros fill it up to the product of the factors.
        term: factors and bonds.
    """
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    rows, columns = math.prod(term.rows), math.prod(term.columns)
    padded = F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        found = tensor_train_matrix(padded.reshape(*term.rows, *term.columns), [1, *term.bonds, 1], svd=truncated_svd)
    return [core.contiguous() for core in found.factors]


def truncated_svd(matrix: torch.Tensor, n_eigenvecs: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular triplets of ``matrix``; TensorLy calls this.

    They are exact, or of few of many leading ones as near as iteration comes.

    Args:
        matrix: (rows, columns).
        n_eigenvecs: how many.

    Returns:
        Left vectors (rows, n), values (n,), right vectors (n, columns).
    """
    if iteration_pays(min(matrix.shape), n_eigenvecs):
        found = _iterated_svd(matrix, n_eigenvecs)
        if found is not None:
            return found
    return _exact_svd(matrix, n_eigenvecs)


def _iterated_svd(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if matrix.shape[0] > matrix.shape[1]:
        found = _iterated_svd(matrix.T, count)
        return None if found is None else (found[2].T, found[1], found[0].T)
    total = float(matrix.square().sum())
    basis = leading_directions(lambda x: matrix @ (matrix.T @ x), matrix, matrix.shape[0], count, total)
    if basis is None:
        return None
    left, values, right = _exact_svd(basis.T @ matrix, count)
    return basis @ left, values, right


def _exact_svd(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer may fail to converge in float32; twice the digits have always sufficed.
        left, values, right = (part.to(matrix.dtype) for part in torch.linalg.svd(matrix.double(), full_matrices=False))
    return left[:, :count], values[:count], right[:count]


def balanced(cores: Cores) -> Cores:
    """Return the same operator with equal norms on both sides of each entry of each bond, as training likes it."""
    cores = list(cores)
    for index in range(len(cores) - 1):
        left, right = cores[index], cores[index + 1]
        # A zero on either side leaves that entry of the bond as it is.
        ratio = left.flatten(0, 2).norm(dim=0) / right.flatten(1).norm(dim=1)
        scale = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
        cores[index], cores[index + 1] = left / scale, right * scale.view(-1, 1, 1, 1)
    return cores


def rebuild(cores: Cores) -> torch.Tensor:
    """Return the matrix that cores stand for, (product of outputs, product of inputs), zeros of padding included.

    The cores are merged from the side whose bond is smaller, so that the last and largest product is the cheapest.
    """
    if len(cores) > 2 and cores[0].shape[3] < cores[-1].shape[0]:
        return _merge_from_right(cores)
    merged = cores[0]
    for core in cores[1:]:
        merged = _joined(merged, core)
    return merged[0, :, :, 0]


def check_finite(matrix: torch.Tensor) -> None:
    """Refuse a matrix with entries that are not finite.

    Raises:
        FiftyfoldError: if it has any.
    """
    if not bool(matrix.isfinite().all()):
        raise FiftyfoldError("the weight has entries that are not finite; a training diverged, or a file is damaged.")


def as_memory_error(error: BaseException, shape: tuple[int, ...]) -> BaseException:
    """Return a sentence for an error of an allocator that has no memory left, and any other error as it is."""
    if isinstance(error, MemoryError) or "alloc" in str(error).lower() or "out of memory" in str(error).lower():
        return FiftyfoldError(
            f"the memory does not suffice to decompose a matrix of shape {shape}; the model is unchanged. "
            "Free memory, or leave the matrix out with exclude."
        )
    return error


def _merge_from_right(cores: Cores) -> torch.Tensor:
    merged = cores[-1]
    for core in reversed(cores[:-1]):
        merged = _joined(core, merged)
    return merged[0, :, :, 0]


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Contract the bond between two neighbours into one core."""
    left, rows, columns, bond = first.shape
    _, more_rows, more_columns, right = second.shape
    product = first.reshape(-1, bond) @ second.reshape(bond, -1)
    product = product.view(left, rows, columns, more_rows, more_columns, right).transpose(2, 3)
    return product.reshape(left, rows * more_rows, columns * more_columns, right)
