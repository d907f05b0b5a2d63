"""Products by tables are float32 products whose sums are added up in another order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.kernels import training
from fiftyfold.kernels.table_product import find_entries, multiply_rows
from tests.kernels.examples import random_codes
from tests.kernels.paths import library, path, same_bits, threads

pytestmark = pytest.mark.skipif(not training.is_native(torch.ones(1)), reason="there is no library for this processor")


def multiply(rows, codes, scale, bits):
    return multiply_rows(rows, find_entries(codes, bits), scale, bits, codes.shape[1])


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 31, 32, 33, 70, 96]),
    outputs=st.sampled_from([1, 2, 3, 4, 5, 8, 23, 24, 25, 47, 48, 49, 130, 136]),
    inputs=st.sampled_from([0, 1, 2, 3, 4, 16, 17, 255, 256, 257, 300]),
    bits=st.sampled_from([1, 2]),
    per_tensor=st.booleans(),
    magnitude=st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_product(tokens, outputs, inputs, bits, per_tensor, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(outputs, inputs, bits, generator)
    rows = torch.randn(outputs, tokens, generator=generator).t() * magnitude
    scale = torch.rand(1 if per_tensor else outputs, 1, generator=generator).half()
    weight = codes.double() * scale.double()
    error = (multiply(rows, codes, scale, bits).double() - rows.double() @ weight).abs()
    assert (error <= 1e-6 * (rows.double().abs() @ weight.abs()) + 1e-44 * outputs).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_integers_are_summed_exactly(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = random_codes(3072, 40, bits, generator)
    rows = torch.randint(-1000, 1001, (65, 3072), generator=generator).float()
    assert torch.equal(multiply(rows, codes, torch.ones(1, 1).half(), bits), rows @ codes.float())
    extreme = torch.full((3, 3072), 1000.0)
    for code in (1, -1):
        codes = torch.full((3072, 5), code, dtype=torch.int8)
        assert torch.equal(multiply(extreme, codes, torch.ones(1, 1).half(), bits), extreme @ codes.float())


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_where_a_product_shows_it(bits, odd):
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(50, 33, bits, generator)
    rows = torch.randn(40, 50, generator=generator)
    rows[7, 11] = odd
    found, expected = multiply(rows, codes, torch.ones(1, 1).half(), bits), rows @ codes.float()
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found.isnan(), expected.isnan())
    assert multiply(rows, codes, torch.full((1, 1), torch.nan).half(), bits).isnan().all()


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("inputs", [77, 1001])
def test_bits_depend_on_neither_the_path_nor_threads_nor_other_rows(bits, inputs):
    generator = torch.Generator().manual_seed(0)
    codes, rows = random_codes(100, inputs, bits, generator), torch.randn(130, 100, generator=generator)
    scale = torch.rand(100, 1, generator=generator).half()
    expected = multiply(rows, codes, scale, bits)
    for name, count in itertools.product(library().paths(), (1, 2, 3, 16)):
        with path(name), threads(count):
            assert same_bits(multiply(rows, codes, scale, bits), expected)
            assert same_bits(multiply(rows[:20], codes, scale, bits), expected[:20])
    assert same_bits(multiply(rows[5:40], codes, scale, bits), expected[5:40])
