"""A layer of floats by tables is the float32 product, for every path, type, width and number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiftyfold.kernels.operators import arrange_weight, packed_linear
from fiftyfold.kernels.table_linear import arrange_for_tables, has_tables, table_linear
from tests.kernels.examples import random_codes
from tests.kernels.paths import library, path, same_bits, threads

pytestmark = pytest.mark.skipif(not has_tables(), reason="there is no library for this processor")


def build(tokens, inputs, outputs, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    codes = random_codes(outputs, inputs, bits, generator)
    return x, codes, torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 300),
    bits=st.sampled_from([1, 2]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    stride=st.integers(1, 2),
    count=st.integers(1, 3),
    name=st.sampled_from(["first", "last"]),
    seed=st.integers(0, 9),
)
def test_it_is_the_product(tokens, inputs, outputs, bits, biased, dtype, stride, count, name, seed):
    x, codes, scale, bias = build(tokens, inputs * stride, outputs, bits, seed)
    x, codes = x.to(dtype)[:, ::stride], codes[:, :inputs]
    paths = library().paths()
    with path(paths[0] if name == "first" else paths[-1]), threads(count):
        found = table_linear(x, arrange_for_tables(codes, bits), scale, bias if biased else None, bits=bits)
    weight = codes.double() * scale.double().unsqueeze(1)
    expected = x.double() @ weight.t() + (bias.double() if biased else 0)
    bound = 1e-6 * (x.double().abs() @ weight.abs().t() + bias.double().abs())
    bound += torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_a_rows_bits_depend_on_no_other_row_nor_on_path_or_threads(bits):
    x, codes, scale, bias = build(70, 130, 530, bits)
    weight = arrange_for_tables(codes, bits)
    expected = torch.cat([table_linear(row.view(1, -1), weight, scale, bias, bits=bits) for row in x])
    for name in library().paths():
        for count in (1, 2, 5):
            with path(name), threads(count):
                for rows in (2, 8, 9, 33, 70):
                    assert same_bits(table_linear(x[:rows], weight, scale, bias, bits=bits), expected[:rows])


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(bits, odd):
    x, codes, scale, bias = build(3, 50, 60, bits)
    x[1, 7] = odd
    found = table_linear(x, arrange_for_tables(codes, bits), scale, bias, bits=bits)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 50), (2, 0, 50), (50,), (2, 3, 50)])
def test_leading_dimensions(shape):
    _, codes, scale, bias = build(1, 50, 60, 1)
    x = torch.randn(shape)
    found = table_linear(x, arrange_for_tables(codes, 1), scale, bias, bits=1)
    assert torch.allclose(found, torch.nn.functional.linear(x, codes * scale.unsqueeze(1), bias), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[:, :-1]}, "width"),
        ({"x": lambda x: x.long()}, "float32, bfloat16 or float16"),
        ({"scale": lambda s: s[:-1]}, "width"),
        ({"scale": lambda s: s.half()}, "float32 vector"),
        ({"bias": lambda b: b[:-1]}, "one entry for each output"),
        ({"weight": lambda w: w[:-1]}, "width"),
        ({"bits": lambda _: 2}, "width"),
        ({"bits": lambda _: 3}, "1 or 2 bits"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, codes, scale, bias = build(2, 50, 60, 1)
    arguments = {"x": x, "weight": arrange_for_tables(codes, 1), "scale": scale, "bias": bias, "bits": 1}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fiftyfold.table_linear.default(*arguments.values())


def test_neither_product_takes_the_others_arrangement():
    """Of the same length, with 48 binary inputs and outputs so that both take whole blocks."""
    x, codes, scale, _ = build(2, 48, 64, 1)
    packed, columns = arrange_weight(codes, scale.unsqueeze(1), 1)
    tabled = arrange_for_tables(codes, 1)
    longer = torch.cat([torch.zeros(len(tabled) - len(packed), dtype=torch.uint8), packed])
    with pytest.raises(RuntimeError, match="not arranged"):
        table_linear(x, longer, scale, None, bits=1)
    with pytest.raises(RuntimeError, match="not arranged"):
        packed_linear(x, tabled[-len(packed) :], columns, bits=1)


def test_it_is_an_operator_that_compilers_see_through():
    x, codes, scale, bias = build(3, 50, 60, 2)
    arguments = (x, arrange_for_tables(codes, 2), scale, bias, 2)
    torch.library.opcheck(
        torch.ops.fiftyfold.table_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )

    def call(x):
        return table_linear(x, *arguments[1:4], bits=2) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), call(x))
    assert torch.equal(compiled(x.repeat(2, 1)), call(x.repeat(2, 1)))
