"""Leading directions by iteration, against exact ones."""

from __future__ import annotations

import pytest
import torch

from fiftyfold.modules.tensor_network import subspace
from fiftyfold.modules.tensor_network.decomposition import truncated_svd
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.solvers import principal_outputs
from fiftyfold.modules.tensor_network.subspace import leading_directions

SIZE, COUNT = 160, 20
PLACES = torch.arange(1, SIZE + 1, dtype=torch.float64)

SPECTRA = {
    "a power": PLACES**-1.5,
    "exponential": torch.exp(-PLACES / 5),
    "flat": torch.ones(SIZE, dtype=torch.float64),
    "nearly flat": 1 + 0.3 * (1 - PLACES / SIZE),
    "a slope": 1 - PLACES / (SIZE + 1),
    "a step": torch.where(PLACES <= COUNT, 1.1, 1.0),
    "ties across the end": torch.where(PLACES <= 2 * COUNT, 1.0, 0.1),
    "deficient": torch.where(PLACES <= 5, 1.0, 0.0),
    "nothing": torch.zeros(SIZE, dtype=torch.float64),
}


def operator(values, kind):
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    return ((vectors * values) @ vectors.T).to(kind)


def found_of(matrix):
    return leading_directions(lambda x: matrix @ x, matrix, SIZE, COUNT, float(matrix.trace()))


def held(matrix, directions):
    return float((directions.T @ matrix @ directions).trace())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_is_returned_holds_what_can_be_held(spectrum, kind):
    values = SPECTRA[spectrum]
    matrix = operator(values, kind)
    directions = found_of(matrix)
    if directions is None:
        assert spectrum in {"nearly flat", "a slope", "a step"}, "it gives up on hard spectra only"
        return
    assert directions.shape == (SIZE, COUNT)
    torch.testing.assert_close(directions.T @ directions, torch.eye(COUNT, dtype=kind), atol=1e-5, rtol=0)
    best = float(values[:COUNT].sum())
    assert held(matrix, directions) >= best - 1e-3 * (float(values.sum()) - best) - 1e-5


def test_two_steps_would_not_do():
    """What the check is for: on a spectrum that falls slowly the usual two steps leave much out."""
    values = SPECTRA["a slope"]
    matrix = operator(values, torch.float64)
    block = torch.randn(SIZE, COUNT + 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):
        block = torch.linalg.qr(matrix @ (matrix @ block))[0]
    inner = torch.linalg.eigvalsh(block.T @ matrix @ block)
    best = float(values[:COUNT].sum())
    assert float(inner[-COUNT:].sum()) < best - 1e-3 * (float(values.sum()) - best)


def test_the_same_numbers_come_every_time():
    matrix = operator(SPECTRA["a power"], torch.float32)
    first = found_of(matrix)
    torch.manual_seed(5)
    second = found_of(matrix)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@pytest.fixture
def for_small_matrices(monkeypatch):
    monkeypatch.setattr(subspace, "_SMALLEST_SIZE", 32)


@pytest.mark.usefixtures("for_small_matrices")
@pytest.mark.parametrize("shape", [(SIZE, 200), (200, SIZE)])
@pytest.mark.parametrize("spectrum", ["a power", "a slope", "deficient", "nothing"])
def test_both_callers_come_as_near_as_exact_ones(shape, spectrum):
    generator = torch.Generator().manual_seed(4)
    left, right = (
        torch.linalg.qr(torch.randn(side, SIZE, generator=generator, dtype=torch.float64))[0] for side in shape
    )
    matrix = (left * SPECTRA[spectrum].sqrt()) @ right.T
    count = 9
    samples = torch.randn(400, shape[1], generator=generator, dtype=torch.float64)
    metric = Metric(samples.T @ samples)
    vectors, values, others = truncated_svd(matrix, count)
    exact = torch.linalg.svdvals(matrix)
    error = (matrix - (vectors * values) @ others).norm()
    assert error <= exact[count:].norm() * (1 + 1e-3) + 1e-6
    directions = principal_outputs(matrix, metric, count)
    assert directions.shape == (shape[0], count)
    whole = torch.linalg.svdvals(matrix @ metric.root())
    left_out = metric.squared(matrix - directions @ (directions.T @ matrix)) ** 0.5
    assert left_out <= float(whole[count:].norm()) * (1 + 1e-3) + 1e-6


@pytest.mark.usefixtures("for_small_matrices")
def test_a_spectrum_that_is_too_flat_is_decomposed_exactly(monkeypatch):
    monkeypatch.setattr(subspace, "_LARGEST_STEPS", 1)
    matrix = operator(SPECTRA["a slope"], torch.float64)
    assert found_of(matrix) is None
    values = truncated_svd(matrix, 8)[1]
    torch.testing.assert_close(values, SPECTRA["a slope"][:8], atol=1e-9, rtol=0)
