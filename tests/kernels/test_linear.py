import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import linear
from fiftyfold.kernels.linear import integer_linear, multiply_codes
from fiftyfold.kernels.operators import arrange_weight, packed_linear
from fiftyfold.modules.quantization.quantizers import dequantize_weight, fake_quantize_activation, quantize_weight
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings


def exact_product(x, codes):
    return x.to(torch.int64) @ codes.to(torch.int64).t()


def layer(bits=1, granularity="per_tensor", outputs=24, inputs=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    codes, scale = quantize_weight(weight, WeightSettings(bits, granularity))
    return codes, scale.float().expand(outputs, 1).t(), torch.randn(outputs, generator=generator)


def assert_like_fake_quantized(x, codes, scale, bias, how):
    limits = {"low": torch.tensor(-2.0), "high": torch.tensor(1.5)} if how.range == "static" else {}
    weight = dequantize_weight(codes, scale.t())
    quantized = fake_quantize_activation(x, how, **limits)
    expected = F.linear(quantized.float(), weight, bias)
    largest = torch.tensor(2.0) if limits else None
    result = integer_linear(
        x, codes, scale, bias, bits=how.bits, full_range=how.full_range, clip=how.clip, largest=largest
    )
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    tolerance = 1e-6 * F.linear(quantized.float().abs(), weight.abs(), None if bias is None else bias.abs()) + 1e-30
    tolerance += expected.abs() * {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    if x.dtype != torch.float32:
        # The fake-quantized input was rounded to the half type, and the integers were not.
        tolerance += F.linear(quantized.float().abs(), weight.abs()) * {torch.bfloat16: 2**-8}.get(x.dtype, 2**-11)
    assert ((result.float() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize(
    "how",
    [
        ActivationSettings(),
        ActivationSettings(full_range=True),
        ActivationSettings(4),
        ActivationSettings(clip=0.7),
        ActivationSettings(range="static"),
    ],
    ids=["narrow", "full", "4 bits", "clip", "static"],
)
def test_integers_compute_what_the_fake_quantized_layer_computes(bits, granularity, how):
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    codes, scale, bias = layer(bits, granularity)
    assert_like_fake_quantized(x, codes, scale, bias, how)
    assert_like_fake_quantized(x, codes, scale, None, how)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 100),
)
def test_any_shape_and_magnitude(rows, inputs, outputs, magnitude, seed):
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * magnitude
    codes, scale, bias = layer(8, "per_channel", outputs, inputs, seed)
    assert_like_fake_quantized(x, codes, scale, bias, ActivationSettings())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    codes, scale, bias = layer()
    assert_like_fake_quantized(x, codes, scale, bias, ActivationSettings())


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (1, 1, 1, 40)])
def test_leading_dimensions(shape):
    codes, scale, bias = layer()
    assert integer_linear(torch.ones(shape), codes, scale, bias).shape == (*shape[:-1], 24)


def test_a_token_of_zeros_gives_the_bias():
    codes, scale, bias = layer()
    assert torch.equal(integer_linear(torch.zeros(2, 40), codes, scale, bias), bias.expand(2, -1))


def test_what_is_not_finite_stays_in_its_token():
    x = torch.ones(3, 40)
    x[1, 7] = float("nan")
    codes, scale, bias = layer()
    result = integer_linear(x, codes, scale, bias)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 17, 33])
@pytest.mark.parametrize("inputs", [1, 2, 3, 40])
@pytest.mark.parametrize("outputs", [1, 2, 9, 32])
def test_the_product_is_exact(rows, inputs, outputs):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, inputs), generator=generator).to(torch.int8)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    assert torch.equal(multiply_codes(x, codes).long(), exact_product(x, codes))


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_product_is_exact_at_the_extremes(rows, sign):
    x = torch.full((rows, 520), -128, dtype=torch.int8)
    codes = torch.full((7, 520), 127 * sign, dtype=torch.int8)
    assert torch.equal(multiply_codes(x, codes).long(), exact_product(x, codes))


def test_the_float_path_is_used_where_int8_products_may_saturate(monkeypatch):
    monkeypatch.setattr(linear, "int8_product_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    x = torch.randint(-127, 128, (5, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes, _, _ = layer(8)
    assert torch.equal(multiply_codes(x, codes).long(), exact_product(x, codes))


@pytest.mark.parametrize("int8_is_exact", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit(dtype, bits, int8_is_exact, monkeypatch):
    monkeypatch.setattr(linear, "int8_product_is_exact", lambda: int8_is_exact)
    codes, scale, bias = layer(bits, inputs=2000)
    x = torch.randn(3, 2000)
    arranged, scales = arrange_weight(codes, scale.t(), bits)
    with torch.no_grad():
        expected = integer_linear(x, codes, scale, bias), packed_linear(x, arranged, scales, bias, bits=bits)
        with torch.autocast("cpu", dtype):
            found = integer_linear(x, codes, scale, bias), packed_linear(x, arranged, scales, bias, bits=bits)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.long, r"torch\.int64, but a layer takes floating-point"),
        (lambda x: x + 1j, r"torch\.complex64, but a layer takes floating-point"),
        (torch.Tensor.bool, r"torch\.bool, but a layer takes floating-point"),
        (torch.Tensor.to_sparse, r"torch\.sparse_coo, but a layer takes dense"),
        (lambda x: x.double().to_sparse(), r"torch\.sparse_coo, but a layer takes dense"),
    ],
)
def test_an_input_of_no_floating_point_type_or_a_sparse_one_is_refused(bits, change, message):
    codes, scale, _ = layer(bits)
    x = change(torch.eye(3, 40))
    with pytest.raises(FiftyfoldError, match=message):
        packed_linear(x, *arrange_weight(codes, scale.t(), bits), bits=bits)


def test_what_does_not_fit_is_refused():
    codes, scale, _ = layer()
    with pytest.raises(FiftyfoldError, match="takes 40 features"):
        integer_linear(torch.ones(2, 41), codes, scale)
    with pytest.raises(FiftyfoldError, match=r"shape \(groups, 24\)"):
        integer_linear(torch.ones(2, 40), codes, torch.ones(24, 1))
    with pytest.raises(FiftyfoldError, match="must be int8"):
        integer_linear(torch.ones(2, 40), codes.float(), scale)
    with pytest.raises(FiftyfoldError, match="int32"):
        integer_linear(torch.ones(1, 2**17 + 1), torch.ones(1, 2**17 + 1, dtype=torch.int8), torch.ones(1, 1))
