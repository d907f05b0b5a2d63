"""Solving in the metric of the inputs."""

from __future__ import annotations

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.tensor_network.allocation import Option, allocate
from fiftyfold.modules.tensor_network.decomposition import decompose, rebuild
from fiftyfold.modules.tensor_network.families import (
    FAMILIES,
    best_form,
    form_of_family,
    forms_of_family,
    low_rank_curve,
)
from fiftyfold.modules.tensor_network.form import NetworkForm, Term, balanced_form, low_rank_form, low_rank_term
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.solvers import _descend, _solve_edge, solve, sweep


def problem(outputs: int, inputs: int, rank: int | None = None) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    samples = torch.randn(rank or 4 * inputs, inputs, generator=generator, dtype=torch.float64)
    samples *= torch.linspace(0.05, 3, inputs, dtype=torch.float64)
    return matrix, Metric(samples.T @ samples)


def built(networks, shape):
    return sum(rebuild(cores)[: shape[0], : shape[1]] for cores in networks)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
def test_low_rank_is_the_whitened_svd(shape):
    matrix, metric = problem(*shape)
    found = built(solve(matrix, low_rank_form(shape, 5), metric), shape)
    root = metric.root()
    left, values, right = torch.linalg.svd(matrix @ root)
    best = (left[:, :5] * values[:5] @ right[:5]) @ torch.linalg.inv(root)
    torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-6)
    curve = low_rank_curve(matrix, metric)
    assert float(curve[5]) ** 0.5 == pytest.approx(metric.relative_error(matrix, found), rel=1e-6)
    assert float(curve[0]) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(24, 36), (25, 30)])
@pytest.mark.parametrize("cores", [2, 3])
def test_the_error_falls_from_sweep_to_sweep(shape, cores):
    matrix, metric = problem(*shape)
    form = balanced_form(shape, cores, 4)
    errors = [metric.squared(matrix - built(decompose(matrix, form), shape))]
    networks = decompose(matrix, form)
    for _ in range(4):
        networks = [sweep(matrix, networks[0], metric)]
        errors.append(metric.squared(matrix - built(networks, shape)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("index", [0, 1])
def test_the_normal_equations_are_exact(index):
    """No small step away from their solution lowers the error, and conjugate gradients arrive at the same."""
    matrix, metric = problem(24, 36)
    (cores,) = decompose(matrix, balanced_form((24, 36), 2, 3))
    weighted = matrix @ metric.moment
    exact, iterated = _solve_edge(weighted, metric.moment, cores, index), list(cores)
    for _ in range(20):
        iterated[index] = _descend(weighted, metric.moment, iterated, index)
    torch.testing.assert_close(iterated[index], exact, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_is_no_worse_than_its_parts(family):
    matrix, metric = problem(24, 36)
    form = form_of_family((24, 36), family, 800, 16)
    assert form is not None
    assert 600 < form.with_gauge("fixed").stored_bytes() <= 800
    error = metric.squared(matrix - built(solve(matrix, form, metric), (24, 36)))
    for term in form.terms:
        alone = NetworkForm((24, 36), (term,))
        assert error <= metric.squared(matrix - built(solve(matrix, alone, metric), (24, 36))) * (1 + 1e-9)


def test_the_best_family_is_chosen():
    matrix, metric = problem(24, 36)
    _, chosen = best_form(matrix, metric, FAMILIES, 800, 16)
    error = metric.squared(matrix - built(chosen, (24, 36)))
    for family in FAMILIES:
        form = form_of_family((24, 36), family, 800, 16)
        assert error <= metric.squared(matrix - built(solve(matrix, form, metric), (24, 36))) * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_deficient_and_badly_scaled_moments_do_not_fail(scale, rank):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(rank, 36, generator=generator)
    metric, matrix = Metric(samples.T @ samples * scale), torch.randn(24, 36, generator=generator)
    form = NetworkForm((24, 36), (low_rank_term((24, 36), 3), balanced_form((24, 36), 2, 3).terms[0]))
    found = built(solve(matrix, form, metric), (24, 36))
    assert torch.isfinite(found).all()
    assert metric.relative_error(matrix, found) <= 1


def test_a_moment_that_is_no_number_is_refused():
    with pytest.raises(FiftyfoldError, match="finite"):
        Metric(torch.full((3, 3), torch.nan))


def test_bytes_go_where_they_lower_the_cost():
    steep = [Option(10, 9.0), Option(20, 1.0), Option(40, 0.0)]
    flat = [Option(10, 1.0), Option(20, 0.9), Option(40, 0.8)]
    assert allocate([steep, flat], 30) == [1, 0]
    assert allocate([steep, flat], 1000) == [2, 2]
    with pytest.raises(FiftyfoldError, match="cannot be met"):
        allocate([steep, flat], 19)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(24, 36), (23, 36), (48, 24)])
@pytest.mark.parametrize("family", ["mpo2", "mpo3", "sum20", "sum50"])
def test_a_searched_cut_is_no_worse_than_an_even_one(family, shape, bits):
    matrix, metric = problem(*shape)
    size = 0.45 * 2 * matrix.numel()
    forms = forms_of_family(shape, family, size, bits)
    assert family != "mpo2" or len(forms) > 1
    assert all(form.with_gauge("fixed").stored_bytes(bits) <= size for form in forms)
    even = form_of_family(shape, family, size, bits)
    assert forms[0] == even
    _, networks = best_form(matrix, metric, (family,), size, bits)
    error = metric.squared(matrix - built(networks, shape))
    assert error <= metric.squared(matrix - built(solve(matrix, even, metric), shape)) * (1 + 1e-9)


def test_a_cut_that_suits_the_matrix_is_found():
    """A matrix that is a chain of two uneven cores comes back whole."""
    generator = torch.Generator().manual_seed(0)
    _, metric = problem(24, 24)
    rows, columns = (8, 3), (3, 8)
    cores = [
        torch.randn(1, 8, 3, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, 3, 8, 1, generator=generator, dtype=torch.float64),
    ]
    size = NetworkForm((24, 24), (Term(rows, columns, (3,)),), "fixed").stored_bytes()
    matrix = rebuild(cores)
    form, networks = best_form(matrix, metric, ("svd", "mpo2"), size, 16)
    assert (form.terms[0].rows, form.terms[0].columns) == (rows, columns)
    assert metric.relative_error(matrix, built(networks, (24, 24))) < 1e-3
