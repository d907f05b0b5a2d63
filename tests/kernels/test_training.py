"""The fused kernels of training give the bits of the torch operations that they replace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.kernels import training
from fiftyfold.modules.quantization.quantizers import (
    fake_quantize_activation,
    fake_quantize_weight,
    fused_weight_arguments,
    quantize_weight,
)
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings

pytestmark = pytest.mark.skipif(not training.is_fused(torch.ones(1)), reason="there is no library for this processor")

GRIDS = [
    ActivationSettings(),
    ActivationSettings(full_range=True),
    ActivationSettings(4),
    ActivationSettings(16),
    ActivationSettings(clip=0.7),
    ActivationSettings(range="static", clip=2.0),
]


@pytest.fixture
def with_torch(monkeypatch):
    """Return a function that computes with torch's operations alone."""

    def compute(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(training, "is_fused", lambda _: False)
            patch.setattr(training, "is_native", lambda _: False)
            return function(*arguments)

    return compute


def weight_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, : columns // 2] = 0
    weight[0, 0] = -0.0
    return weight


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("granularity", "group"), [("per_tensor", None), ("per_channel", None), ("per_group", 6)])
@pytest.mark.parametrize("clip", [None, 0.03])
@pytest.mark.parametrize("shape", [(1, 6), (7, 18), (37, 66), (2, 1002)])
def test_weights(bits, granularity, group, clip, shape, with_torch):
    how = WeightSettings(bits, granularity, group, clip)
    weight = weight_of(*shape, seed=bits)
    codes, scale = quantize_weight(weight, how)
    expected_codes, expected_scale = with_torch(quantize_weight, weight, how)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert scale.shape == expected_scale.shape
    values = fake_quantize_weight(weight, how)
    assert torch.equal(values, with_torch(fake_quantize_weight, weight, how))
    assert torch.equal(values, training.dequantize_weight(training.WeightCodes(codes, scale)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-30, 1.0, 1e6]),
    grid=st.sampled_from(GRIDS),
    seed=st.integers(0, 100),
)
def test_activations(rows, columns, magnitude, grid, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    limits = (torch.tensor(-1.5), torch.tensor(0.7)) if grid.range == "static" else ()
    found = fake_quantize_activation(x, grid, *limits)
    # One more type takes torch's operations; float64 would change the arithmetic, a subclass does not.
    expected = fake_quantize_activation(x.as_subclass(Plain), grid, *limits)
    assert torch.equal(found, expected.as_subclass(torch.Tensor))


class Plain(torch.Tensor):
    """A tensor that the fused kernels leave alone."""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_not_finite(value, grid, with_torch):
    x = torch.randn(3, 20)
    x[1, 4] = value
    limits = (torch.tensor(-1.5), torch.tensor(0.7)) if grid.range == "static" else ()
    found = fake_quantize_activation(x, grid, *limits)
    assert torch.equal(found.nan_to_num(7e7), with_torch(fake_quantize_activation, x, grid, *limits).nan_to_num(7e7))


def test_other_inputs_take_torch():
    for x in (torch.ones(3, 4).t(), torch.ones(3, 4).half(), torch.ones(0, 4), torch.ones(3, 4, device="meta")):
        assert not training.is_fused(x)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_threads_change_no_bit(bits):
    weight = weight_of(900, 130, seed=3)
    how = fused_weight_arguments(weight, WeightSettings(bits))
    before = torch.get_num_threads()
    alone = training.quantize_weight(weight, **how)
    checksum = training.checksum(weight)
    try:
        torch.set_num_threads(3)
        together = training.quantize_weight(weight, **how)
        assert training.checksum(weight) == checksum
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.scale, together.scale)


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), data=st.data())
def test_a_checksum_tells_every_edit(rows, columns, data):
    weight = torch.randn(rows, columns)
    before = training.checksum(weight)
    edited = weight.clone()
    kind = data.draw(st.sampled_from(["negate", "negate some", "one bit", "swap"]))
    if kind == "negate":
        edited.neg_()
    elif kind == "negate some":
        edited[torch.rand(edited.shape) < 0.5] *= -1
    elif kind == "one bit":
        place = data.draw(st.integers(0, weight.numel() - 1))
        edited.view(torch.int32).view(-1)[place] ^= 1 << data.draw(st.integers(0, 30))
    else:
        edited = edited.flip(1).contiguous()
    assert (training.checksum(edited) == before) == torch.equal(edited, weight)
    assert training.checksum(weight.clone()) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_weight_that_is_not_finite(value, bits, granularity, with_torch):
    weight = weight_of(4, 20, seed=1)
    weight[2, 3] = value
    how = WeightSettings(bits, granularity)
    found, expected = fake_quantize_weight(weight, how), with_torch(fake_quantize_weight, weight, how)
    assert torch.equal(found.nan_to_num(7e7), expected.nan_to_num(7e7))
