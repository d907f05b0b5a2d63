"""Rounding in the metric of the inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.rounding import DAMPING, round_to_grid
from fiftyfold.modules.quantization.settings import WeightSettings


def correlated(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def squared(error, moment):
    return float(((error.double() @ moment.double()) * error.double()).sum())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    bits=st.sampled_from([3, 4, 8]),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-7, 1e-5, 1e-4, 1e-3, 1.0, 1e3]),
)
def test_the_quantizer_gives_it_back(rows, columns, bits, seed, size):
    weight, moment = correlated(rows, columns, seed)
    rounded = round_to_grid(weight * size, moment, bits)
    codes, scale = quantize_weight(rounded, WeightSettings(bits, "per_channel"))
    assert torch.equal(dequantize_weight(codes, scale), rounded)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_small_rows_are_no_worse_than_rounded_to_the_nearest(bits, size):
    weight, moment = correlated(16, 64)
    plain = dequantize_weight(*quantize_weight(weight * size, WeightSettings(bits, "per_channel")))
    rounded = round_to_grid(weight * size, moment, bits)
    assert squared(weight * size - rounded, moment) <= 1.001 * squared(weight * size - plain, moment)


def test_moments_that_rounding_made_indefinite():
    weight, moment = correlated(8, 32)
    values, vectors = torch.linalg.eigh(moment)
    values[:3] = -0.2 * float(values.mean())
    assert bool(round_to_grid(weight, vectors * values @ vectors.T, 4).isfinite().all())
    with pytest.raises(FiftyfoldError, match="sum of squares"):
        round_to_grid(weight, torch.eye(32) + 1e6 * torch.eye(32).flip(0), 4)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_outputs_come_nearer_than_by_rounding_to_the_nearest(bits):
    weight, moment = correlated(24, 160)
    plain = dequantize_weight(*quantize_weight(weight, WeightSettings(bits, "per_channel")))
    assert squared(weight - round_to_grid(weight, moment, bits), moment) < 0.6 * squared(weight - plain, moment)


def test_it_is_what_least_squares_for_the_free_columns_gives():
    """A second formulation: after each column, the others are solved for anew in the damped metric."""
    weight, moment = correlated(7, 40)
    rounded = round_to_grid(weight, moment, 4)
    damped = moment.double() / float(moment.double().diagonal().mean())
    damped.diagonal().add_(DAMPING)
    order = moment.diagonal().argsort(descending=True).tolist()
    rest, largest = weight.double().clone(), weight.abs().argmax(dim=1)
    scale = rounded.double().abs().amax(dim=1) / 7
    for place, column in enumerate(order):
        codes = (rest[:, column] / scale).round().clamp(-7, 7)
        codes = torch.where(largest == column, 7 * weight[:, column].sign().double(), codes)
        torch.testing.assert_close(rounded[:, column].double(), codes * scale, rtol=1e-6, atol=1e-9)
        free = order[place + 1 :]
        error = rest[:, column] - codes * scale
        if free:
            rest[:, free] += torch.outer(error, torch.linalg.solve(damped[free][:, free], damped[free, column]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_inputs_that_never_come(kind):
    weight, _ = correlated(4, 12)
    weight[1] = 0
    weight[:, 3] = 0
    rounded = round_to_grid(weight.to(kind), torch.zeros(12, 12), 4)
    assert rounded.dtype == kind
    assert bool(rounded.isfinite().all())
    assert not rounded[1].any()
    assert float((rounded.float() - weight).abs().max()) < 0.3 * float(weight.abs().max())
