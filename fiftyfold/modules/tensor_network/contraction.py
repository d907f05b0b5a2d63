"""Multiplying by a matrix product operator without building its matrix, and when that pays.

Only matrix products, no permuted activations: the state is viewed as [batch, what a core takes, the rest], and each
core, unfolded, multiplies the middle. Right to left or left to right, whichever is cheaper.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fiftyfold.modules.tensor_network.decomposition import Cores
from fiftyfold.modules.tensor_network.form import NetworkForm, Term

# What writing and reading one number costs, in multiplications: 8 bytes at about 15 GB/s, against 50 G a second.
_TRAFFIC = 25


def contract(x: torch.Tensor, cores: Cores, outputs: int) -> torch.Tensor:
    """Multiply by the matrix that cores stand for.

    Args:
        x: (tokens, inputs).
        cores: of one term.
        outputs: how many of the matrix's rows to keep; the others are zeros of padding.

    Returns:
        (tokens, outputs).
    """
    columns = math.prod([core.shape[2] for core in cores])
    x = F.pad(x, (0, columns - x.shape[1])) if columns != x.shape[1] else x
    term = term_of(cores)
    step = _right_to_left if right_to_left_cost(term) <= left_to_right_cost(term) else _left_to_right
    result = step(x, cores)
    return result[:, :outputs] if outputs != result.shape[1] else result


def break_even(form: NetworkForm) -> float:
    """Return up to how many tokens contracting the cores is cheaper than rebuilding the matrix; perhaps infinitely."""
    per_token = sum(min(right_to_left_cost(term), left_to_right_cost(term)) for term in form.terms)
    rows, columns = form.shape
    dense = rows * columns + _TRAFFIC * (rows + columns)
    once = sum(rebuild_cost(term) for term in form.terms)
    return math.inf if per_token <= dense else once / (per_token - dense)


def right_to_left_cost(term: Term) -> float:
    """Return the cost of one token, in multiplications."""
    cost, before, after = 0.0, math.prod(term.columns), 1
    for left, rows, columns, right in reversed(term.core_shapes):
        before //= columns
        cost += before * left * rows * columns * right * after + _TRAFFIC * before * left * rows * after
        after *= rows
    return cost


def left_to_right_cost(term: Term) -> float:
    """Return the cost of one token, in multiplications."""
    cost, before, after = 0.0, 1, math.prod(term.columns)
    for left, rows, columns, right in term.core_shapes:
        after //= columns
        cost += before * left * rows * columns * right * after + _TRAFFIC * before * right * rows * after
        before *= rows
    return cost


def rebuild_cost(term: Term) -> float:
    """Return the cost of rebuilding the matrix, in multiplications."""
    size = math.prod(term.rows) * math.prod(term.columns)
    if not term.bonds:
        return _TRAFFIC * size
    # The last product, over the smaller outer bond, outweighs the others.
    return size * min(term.bonds[0], term.bonds[-1]) + 2 * _TRAFFIC * size


def term_of(cores: Cores) -> Term:
    """Return the form of cores that are at hand."""
    rows, columns = tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores)
    return Term(rows, columns, tuple(core.shape[3] for core in cores[:-1]))


def _right_to_left(x: torch.Tensor, cores: Cores) -> torch.Tensor:
    tokens, after = x.shape[0], 1
    for left, rows, columns, right, core in reversed([(*core.shape, core) for core in cores]):
        matrix = core.reshape(left * rows, columns * right)
        x = _multiply(matrix, x.reshape(-1, columns * right, after))
        after *= rows
    return x.reshape(tokens, after)


def _left_to_right(x: torch.Tensor, cores: Cores) -> torch.Tensor:
    tokens, after = x.shape[0], x.shape[1]
    for core in cores:
        left, rows, columns, right = core.shape
        after //= columns
        matrix = core.permute(1, 3, 0, 2).reshape(rows * right, left * columns)
        x = _multiply(matrix, x.reshape(-1, left * columns, after))
    return x.reshape(tokens, math.prod([core.shape[1] for core in cores]))


def _multiply(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Return ``matrix @ state`` for each entry of the batch."""
    if state.shape[2] == 1:
        return F.linear(state.squeeze(2), matrix).unsqueeze(2)
    return matrix @ state
