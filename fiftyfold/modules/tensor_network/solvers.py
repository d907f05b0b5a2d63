"""Cores that stand nearest to a weight in the metric of its inputs.

Where the inputs stay whole, as in a product of two thin matrices, the best cores are found exactly: they project the
outputs onto their principal components. Where the inputs are cut as well, the metric does not factorize over the cores,
and approximating it by one that does is worse than ignoring it; so the cores are solved for in turn, each by the normal
equations of the full metric, exactly where they are small and by conjugate gradients where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from fiftyfold.modules.tensor_network.decomposition import Cores, balanced, rebuild, tensor_train
from fiftyfold.modules.tensor_network.form import NetworkForm, Term
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.subspace import iteration_pays, leading_directions

SWEEPS = 6
"""How often alternating least squares go over all cores."""

_LARGEST_DIRECT = 4096
_GRADIENT_STEPS = 12
_RIDGE = 1e-9


def solve(
    matrix: torch.Tensor, form: NetworkForm, metric: Metric, sweeps: int = SWEEPS, start: Sequence[Cores] | None = None
) -> list[Cores]:
    """Return the cores of each term of ``form``, solved for in the metric of the inputs.

    The error in that metric never rises from sweep to sweep.

    Args:
        matrix: (outputs, inputs), float32 or float64 as the metric is.
        form: of that shape.
        metric: of the inputs.
        sweeps: over all cores of all terms; terms that are exact by themselves need none when they stand alone.
        start: cores to begin with; by default truncated singular value decompositions.
    """
    networks: list[Cores] = []
    rest = matrix
    for index, term in enumerate(form.terms):
        cores = start[index] if start is not None else first_cores(rest, term, metric)
        networks.append(cores)
        rest = rest - _cropped(cores, form)
    if len(form.terms) == 1 and _is_exact(form.terms[0]):
        return networks
    for _ in range(sweeps):
        for index, term in enumerate(form.terms):
            rest = rest + _cropped(networks[index], form)
            if _is_exact(term):
                networks[index] = whitened_low_rank(rest, term.bonds[0], metric)
            else:
                networks[index] = sweep(rest, networks[index], metric)
            rest = rest - _cropped(networks[index], form)
    return networks


def first_cores(matrix: torch.Tensor, term: Term, metric: Metric) -> Cores:
    """Return cores of one term: exact ones in the metric where the inputs stay whole, else in the plain norm."""
    if _is_exact(term):
        return whitened_low_rank(matrix, term.bonds[0], metric)
    return tensor_train(matrix, term)


def whitened_low_rank(matrix: torch.Tensor, rank: int, metric: Metric) -> Cores:
    """Return the two thin matrices whose product is nearest to ``matrix`` in the metric (SVD-LLM's optimum).

    They are U and UᵀW, where U holds the principal components of the outputs, the leading eigenvectors of W C Wᵀ. So
    the metric is never inverted.

    Args:
        matrix: (outputs, inputs).
        rank: number of components.
        metric: of the inputs.
    """
    outputs, inputs = matrix.shape
    components = principal_outputs(matrix, metric, rank)
    return [components.reshape(1, outputs, 1, rank), (components.T @ matrix).reshape(rank, 1, inputs, 1)]


def principal_outputs(matrix: torch.Tensor, metric: Metric, count: int | None = None) -> torch.Tensor:
    """Return orthonormal directions of the outputs, the strongest first.

    Args:
        matrix: (outputs, inputs).
        metric: of the inputs.
        count: how many; by default as many as there can be. Few of many are found by iteration, where it succeeds.

    Returns:
        (outputs, count).
    """
    outputs, inputs = matrix.shape
    count = min(outputs, inputs) if count is None else min(count, outputs, inputs)
    covariance = matrix @ metric.moment @ matrix.T if outputs <= inputs else None
    if iteration_pays(min(outputs, inputs), count):
        found = _leading_outputs(matrix, metric, covariance, count)
        if found is not None:
            return found
    return _all_principal_outputs(matrix, metric, covariance)[:, :count]


def _leading_outputs(
    matrix: torch.Tensor, metric: Metric, covariance: torch.Tensor | None, count: int
) -> torch.Tensor | None:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        return matrix @ (metric.moment @ (matrix.T @ x)) if covariance is None else covariance @ x

    return leading_directions(multiply, matrix, matrix.shape[0], count, metric.squared(matrix))


def _all_principal_outputs(matrix: torch.Tensor, metric: Metric, covariance: torch.Tensor | None) -> torch.Tensor:
    if covariance is not None:
        directions: torch.Tensor = torch.linalg.eigh((covariance + covariance.T) / 2)[1]
        return directions.flip(1)
    # Through the smaller side; the QR makes orthonormal what rounding and zero directions have bent.
    half = matrix @ metric.root()
    covariance = half.T @ half
    vectors = torch.linalg.eigh((covariance + covariance.T) / 2)[1].flip(1)
    basis: torch.Tensor = torch.linalg.qr(half @ vectors)[0]
    return basis


def sweep(matrix: torch.Tensor, cores: Cores, metric: Metric) -> Cores:
    """Solve for each core of one term in turn, the others held, from the first to the last.

    Args:
        matrix: (outputs, inputs).
        cores: to begin with.
        metric: of the inputs.

    Returns:
        Cores whose error in the metric is not larger.
    """
    cores = balanced(cores)
    rows, columns = math.prod(core.shape[1] for core in cores), math.prod(core.shape[2] for core in cores)
    target = F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    moment = F.pad(metric.moment, (0, columns - metric.size, 0, columns - metric.size))
    weighted = target @ moment
    for index in range(len(cores)):
        edge = index in {0, len(cores) - 1}
        left, _, inputs, right = cores[index].shape
        if edge and left * inputs * right <= _LARGEST_DIRECT:
            cores[index] = _solve_edge(weighted, moment, cores, index)
        else:
            cores[index] = _descend(weighted, moment, cores, index)
    return balanced(cores)


def _is_exact(term: Term) -> bool:
    return term.is_low_rank


def _cropped(cores: Cores, form: NetworkForm) -> torch.Tensor:
    rows, columns = form.shape
    return rebuild(cores)[:rows, :columns]


def _solve_edge(weighted: torch.Tensor, moment: torch.Tensor, cores: Cores, index: int) -> torch.Tensor:
    """Solve the normal equations of the first or the last core; they are the same for each of its outputs."""
    last = index > 0
    core = cores[index]
    others = rebuild_open(cores[:index] if last else cores[index + 1 :], last)
    # others: (outputs, inputs, bond) of the rest of the chain. own: what this core takes.
    bond, own_outputs, own_inputs = (core.shape[0] if last else core.shape[3]), core.shape[1], core.shape[2]
    other_outputs, other_inputs, _ = others.shape
    gram = others.permute(1, 2, 0).reshape(other_inputs * bond, other_outputs)
    gram = (gram @ gram.T).view(other_inputs, bond, other_inputs, bond)
    if last:
        shaped = moment.view(other_inputs, own_inputs, other_inputs, own_inputs)
        right_side = weighted.view(other_outputs, own_outputs, other_inputs, own_inputs).permute(0, 2, 1, 3)
    else:
        shaped = moment.view(own_inputs, other_inputs, own_inputs, other_inputs).permute(1, 0, 3, 2)
        right_side = weighted.view(own_outputs, other_outputs, own_inputs, other_inputs).permute(1, 3, 0, 2)
    # Σ over the others' inputs: (bond, bond) x (own inputs, own inputs).
    normal = gram.permute(1, 3, 0, 2).reshape(bond * bond, -1) @ shaped.permute(0, 2, 1, 3).reshape(-1, own_inputs**2)
    normal = normal.view(bond, bond, own_inputs, own_inputs).permute(0, 2, 1, 3).reshape(bond * own_inputs, -1)
    right_side = others.permute(2, 0, 1).reshape(bond, -1) @ right_side.reshape(other_outputs * other_inputs, -1)
    right_side = right_side.view(bond, own_outputs, own_inputs).permute(0, 2, 1).reshape(bond * own_inputs, own_outputs)
    old = core[..., 0] if last else core[0].permute(2, 0, 1)
    old = old.permute(0, 2, 1).reshape(bond * own_inputs, own_outputs)
    found = _solve_positive(normal, right_side, old).view(bond, own_inputs, own_outputs).permute(0, 2, 1)
    return found.unsqueeze(3) if last else found.permute(1, 2, 0).unsqueeze(0)


def _solve_positive(normal: torch.Tensor, right_side: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Solve for the change from ``old``, so that a ridge which regularizes it never makes things worse."""
    normal = (normal + normal.T) / 2
    gradient = right_side - normal @ old
    scale = float(normal.diagonal().mean())
    for ridge in (_RIDGE, 1e-7, 1e-5, 1e-3):
        damped = normal.clone()
        damped.diagonal().add_(max(scale, torch.finfo(normal.dtype).tiny) * ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            change = torch.cholesky_solve(gradient, factor)
            if bool(change.isfinite().all()) and float((change * (2 * gradient - normal @ change)).sum()) >= 0:
                return old + change
    return old


def _descend(weighted: torch.Tensor, moment: torch.Tensor, cores: Cores, index: int) -> torch.Tensor:
    """Improve one core by conjugate gradients on its normal equations; the error falls with every step."""
    core = cores[index]

    def gradient_of(full: torch.Tensor) -> torch.Tensor:
        return _project(full, cores, index)

    def apply(direction: torch.Tensor) -> torch.Tensor:
        changed = [*cores[:index], direction, *cores[index + 1 :]]
        return gradient_of(rebuild(changed) @ moment)

    residual = gradient_of(weighted) - apply(core)
    found, direction = core.clone(), residual.clone()
    strength = float(residual.square().sum())
    beginning = strength
    for _ in range(_GRADIENT_STEPS):
        if strength <= beginning * 1e-12 or strength == 0:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        found += direction * (strength / curvature)
        residual -= image * (strength / curvature)
        following = float(residual.square().sum())
        direction = residual + direction * (following / strength)
        strength = following
    return found


def _project(full: torch.Tensor, cores: Cores, index: int) -> torch.Tensor:
    """Return the derivative of ⟨full, matrix of the cores⟩ by one core."""
    left = rebuild_open(cores[:index], True) if index else full.new_ones(1, 1, 1)
    right = rebuild_open(cores[index + 1 :], False) if index + 1 < len(cores) else full.new_ones(1, 1, 1)
    _, outputs, inputs, _ = cores[index].shape
    shape = (left.shape[0], outputs, right.shape[0], left.shape[1], inputs, right.shape[1])
    tensor = full.view(shape)
    # (o<, o, o>, i<, i, i>) → sum over o<, i< with left, over o>, i> with right.
    moved = tensor.permute(0, 3, 1, 4, 2, 5).reshape(left.shape[0] * left.shape[1], -1)
    moved = left.reshape(-1, left.shape[2]).T @ moved
    moved = moved.view(-1, right.shape[0] * right.shape[1]) @ right.reshape(-1, right.shape[2])
    return moved.view(left.shape[2], outputs, inputs, right.shape[2])


def rebuild_open(cores: Cores, from_left: bool) -> torch.Tensor:
    """Return (outputs, inputs, bond): a part of a chain whose one end is open.

    Args:
        cores: neighbours; their other end is the end of the chain.
        from_left: whether the open bond is on the right.
    """
    merged = cores[0]
    for core in cores[1:]:
        left, rows, columns, bond = merged.shape
        product = merged.reshape(-1, bond) @ core.reshape(bond, -1)
        product = product.view(left, rows, columns, core.shape[1], core.shape[2], core.shape[3]).transpose(2, 3)
        merged = product.reshape(left, rows * core.shape[1], columns * core.shape[2], core.shape[3])
    return merged[0] if from_left else merged[..., 0].permute(1, 2, 0)
