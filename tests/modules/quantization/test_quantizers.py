import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.overrides import TorchFunctionMode

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import largest_code
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.quantization.quantizers import (
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    quantize_weight,
    scale_shape,
)
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings
from tests.modules.quantization import reference

BITS = (1, 2, 3, 4, 8)
GRANULARITIES = (("per_tensor", None), ("per_channel", None), ("per_group", 4))
WEIGHTS = [WeightSettings(b, g, n) for b, (g, n) in itertools.product(BITS, GRANULARITIES)]
ACTIVATIONS = [
    ActivationSettings(bits, symmetric, "dynamic", full_range)
    for bits, symmetric, full_range in itertools.product((4, 8), (True, False), (True, False))
]
ADVERSARIAL = {
    "zeros": torch.zeros(3, 8),
    "negative zeros": -torch.zeros(3, 8),
    "constant": torch.full((3, 8), -0.25),
    "one row of zeros": torch.cat([torch.zeros(1, 8), torch.ones(2, 8)]),
    "denormal": torch.full((3, 8), 1e-45),
    "below float16": torch.linspace(-1e-8, 1e-8, 24).view(3, 8),
    "near float16's smallest": torch.linspace(-1e-5, 1.1e-5, 24).view(3, 8),
    "above float16": torch.linspace(-1e7, 2e7, 24).view(3, 8),
    "largest": torch.tensor([[3.4e38, -3.4e38, 0, 1, -1, 1e-45, 3.4e38, 3.4e38]] * 3),
    "one outlier": torch.eye(8)[:3] * 1e4 + 1e-3,
}


def random_weight(seed, rows=6, columns=8):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matrices(lowest=2**-6, largest=100):
    magnitudes = st.floats(lowest, largest, width=32)
    numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v))
    shapes = st.tuples(st.integers(1, 5), st.sampled_from([4, 8, 12]))
    return hnp.arrays(np.float32, shapes, elements=numbers).map(torch.from_numpy)


def assert_like_reference(weight, how):
    codes, scale = quantize_weight(weight, how)
    expected, scales = reference.quantize(weight.numpy(), how.bits, how.granularity, how.group_size)
    exact = np.array(scales).reshape(scale.shape)
    np.testing.assert_allclose(scale.double().numpy(), exact, rtol=2**-11, atol=2**-25)
    if how.bits <= 2:
        np.testing.assert_array_equal(codes.numpy(), expected)
    else:
        # The rounded scale may tip an entry in the middle between two codes.
        assert np.abs(codes.numpy() - expected).max() <= 1
        spread = np.repeat(exact, weight.shape[1] // scale.shape[1], axis=1)
        error = np.abs(dequantize_weight(codes, scale).double().numpy() - weight.double().numpy())
        assert (error <= np.broadcast_to(spread, weight.shape) * (0.5 + 2**-11 * largest_code(how.bits)) + 1e-30).all()


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
def test_weights_agree_with_the_float64_formulation(how):
    for seed in range(5):
        assert_like_reference(random_weight(seed), how)


@settings(max_examples=100, deadline=None)
@given(weight=matrices(), how=st.sampled_from(WEIGHTS))
def test_any_weight_agrees_with_the_float64_formulation(weight, how):
    # Values at the ternary threshold itself fall on either side in another precision.
    if how.bits == 2:
        sums = weight.double().abs()
        grouped = (
            sums.view(1, -1) if how.granularity == "per_tensor" else sums.view(-1, how.group_size or sums.shape[1])
        )
        threshold = 0.7 * grouped.mean(1, keepdim=True)
        if ((grouped - threshold).abs() <= 1e-6 * threshold).any() and grouped.any():
            return
    if how.bits > 2 and not weight.any():
        return
    if how.bits > 2 and how.granularity != "per_tensor":
        rows = weight.view(-1, how.group_size or weight.shape[1])
        if (rows.abs().amax(1) == 0).any():
            return
    assert_like_reference(weight, how)


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_weights_give_finite_results_that_stay(name, how):
    weight = ADVERSARIAL[name]
    quantized = fake_quantize_weight(weight, how)
    assert quantized.isfinite().all()
    assert torch.equal(fake_quantize_weight(quantized, how), quantized)


@settings(max_examples=200, deadline=None)
@given(
    weight=hnp.arrays(np.float32, (3, 8), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)).map(
        torch.from_numpy
    ),
    how=st.sampled_from(WEIGHTS),
)
def test_codes_are_allowed_ones_and_quantizing_twice_is_quantizing_once(weight, how):
    codes, scale = quantize_weight(weight, how)
    quantized = fake_quantize_weight(weight, how)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert scale.shape == scale_shape(weight.shape, how)
    assert int(codes.abs().max()) <= largest_code(how.bits)
    assert quantized.isfinite().all()
    assert torch.equal(quantized, dequantize_weight(codes, scale))
    assert torch.equal(fake_quantize_weight(quantized, how), quantized)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_a_binary_weight_become_plus_one(zero):
    codes, scale = quantize_weight(torch.tensor([[zero, 1.0, -2.0, 1.0]]), WeightSettings(1))
    assert codes.tolist() == [[1, 1, -1, 1]]
    assert scale.tolist() == [[1.0]]


def test_the_threshold_of_a_ternary_weight_is_strict():
    # 0.7 * mean = 0.7: the first entry is at it in exact arithmetic, and float32's 0.7 is just below.
    weight = torch.tensor([[0.7, -0.71, 0.0, 2.59]])
    codes, scale = quantize_weight(weight, WeightSettings(2))
    assert codes.tolist() == [[0, -1, 0, 1]]
    assert float(scale) == pytest.approx((0.71 + 2.59) / 2, rel=2**-11)


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
def test_a_transposed_view_is_quantized_like_its_copy(how):
    weight = random_weight(0, 8, 8)
    for one, other in zip(quantize_weight(weight.t(), how), quantize_weight(weight.t().contiguous(), how), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_alone_is_quantized_like_the_row_in_its_matrix(bits):
    how = WeightSettings(bits, "per_channel")
    weight = random_weight(0, 2000, 96)
    together = fake_quantize_weight(weight, how)
    for rows in ([5], [5, 7, 5], list(range(100, 200))):
        assert torch.equal(fake_quantize_weight(weight[rows], how), together[rows])


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_quantized_in_float32(how, dtype):
    weight = random_weight(0).to(dtype)
    quantized = fake_quantize_weight(weight, how)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, fake_quantize_weight(weight.float(), how).to(dtype))
    assert torch.equal(quantized, dequantize_weight(*quantize_weight(weight, how), dtype))


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
@pytest.mark.parametrize("largest", [65504, 65000, 60000])
def test_weights_at_the_end_of_float16_stay_finite(how, largest):
    weight = torch.tensor([[largest, -largest, 1.0, 0.0]] * 2, dtype=torch.float16)
    quantized = fake_quantize_weight(weight, how)
    assert quantized.isfinite().all()
    assert torch.equal(quantized, dequantize_weight(*quantize_weight(weight, how), torch.float16))
    assert torch.equal(fake_quantize_weight(quantized, how), quantized)


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
def test_activations_at_the_end_of_float16_stay_finite(how):
    x = torch.tensor([[65504, 9.0]], dtype=torch.float16)
    limits = torch.tensor(-1e5), torch.tensor(1e5)
    assert fake_quantize_activation(x, how).isfinite().all()
    assert fake_quantize_activation(x, how, *limits).isfinite().all()


@pytest.mark.parametrize("how", WEIGHTS, ids=str)
def test_the_gradient_of_a_weight_is_the_gradient_of_what_it_became(how):
    weight = random_weight(0).requires_grad_()
    upstream = random_weight(1)
    (fake_quantize_weight(weight, how) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_without_clipping_nothing_is_kept_for_the_gradient():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize_weight(random_weight(0).requires_grad_(), WeightSettings(2))
        fake_quantize_activation(random_weight(0).requires_grad_(), ActivationSettings())
    assert not kept


@pytest.mark.parametrize("bits", BITS)
def test_clipping_clamps_the_weight_and_stops_the_gradient_outside(bits):
    weight = torch.tensor([[3.0, -0.5, 1.0, -1.5]], requires_grad=True)
    quantized = fake_quantize_weight(weight, WeightSettings(bits, clip=1.0))
    clamped = fake_quantize_weight(torch.tensor([[1.0, -0.5, 1.0, -1.0]]), WeightSettings(bits))
    assert torch.equal(quantized, clamped)
    quantized.backward(torch.full_like(weight, 2.0))
    assert weight.grad.tolist() == [[0, 2, 2, 0]]


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
def test_activations_agree_with_the_float64_formulation(how):
    for seed in range(20):
        x = random_weight(seed, 10, 16) * 3 + seed / 10
        ours = fake_quantize_activation(x, how).double().numpy()
        theirs = reference.quantize_tokens(x.numpy(), how.bits, symmetric=how.symmetric, full_range=how.full_range)
        step = (np.abs(x.numpy()).max(1, keepdims=True) * 2) / 2 ** (how.bits - 1)
        differs = np.abs(ours - theirs) > 1e-5
        # Only entries in the middle between two codes may fall on the other one.
        assert differs.mean() < 0.002
        assert (np.abs(ours - theirs) <= step * 1.001).all()


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_activations_give_finite_results_near_the_input(name, how):
    x = ADVERSARIAL[name]
    quantized = fake_quantize_activation(x, how)
    assert quantized.isfinite().all()
    # At most one step lost at the top of XTC's grid, plus half a step of rounding, and the zero point's half.
    steps = 2**how.bits - 1
    low, high = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
    span = 2 * torch.maximum(-low, high) if how.symmetric else high - low
    bound = 2 * span / (steps - how.symmetric) + x.double().abs() * 2e-6 + 1e-37
    assert ((quantized.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
def test_a_constant_token_keeps_its_value(how):
    # XTC's symmetric grid lacks the highest value: 127/128 of it is the nearest.
    lost = 2.0 ** (1 - how.bits) if how.full_range and how.symmetric else 2e-6
    quantized = fake_quantize_activation(torch.full((2, 5), 7.25), how)
    torch.testing.assert_close(
        quantized, torch.full((2, 5), 7.25 * (1 - lost if lost > 1e-3 else 1)), rtol=2e-6, atol=0
    )


def test_the_full_range_is_the_published_grid():
    x = torch.tensor([[1.0, -1.0, 0.5]])
    assert fake_quantize_activation(x, ActivationSettings(full_range=True)).tolist() == [[127 / 128, -1.0, 0.5]]
    narrow = fake_quantize_activation(x, ActivationSettings(full_range=False))
    assert narrow[0, :2].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
def test_a_static_range_is_one_for_all_and_clamps(how):
    x = torch.tensor([[-10.0, -1.0, 0.0], [0.5, 1.0, 10.0]])
    quantized = fake_quantize_activation(x, how, torch.tensor(-1.0), torch.tensor(1.0))
    assert quantized.abs().max() <= 1.1
    assert quantized[0, 0] == quantized[0, 1]
    torch.testing.assert_close(quantized, x.clamp(-1, 1), atol=2 / 2 ** (how.bits - 1), rtol=0)


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_are_quantized_in_float32(how, dtype):
    x = (random_weight(0) * 5).to(dtype).requires_grad_()
    quantized = fake_quantize_activation(x, how)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, fake_quantize_activation(x.detach().float(), how).to(dtype))
    quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("how", ACTIVATIONS, ids=str)
def test_the_gradient_of_an_activation_passes_or_is_clipped(how):
    x = torch.tensor([[3.0, -0.5, 2.5, -2.6]], requires_grad=True)
    clipped = ActivationSettings(how.bits, how.symmetric, "dynamic", how.full_range, 2.5)
    for settings_, expected in ((how, [[1.0, 1, 1, 1]]), (clipped, [[0.0, 1, 1, 0]])):
        x.grad = None
        fake_quantize_activation(x, settings_).sum().backward()
        assert x.grad.tolist() == expected


def test_an_empty_batch_passes():
    assert fake_quantize_activation(torch.zeros(0, 5), ActivationSettings()).shape == (0, 5)


def test_what_is_not_finite_shows():
    weight = random_weight(0)
    weight[1, 2] = float("nan")
    with pytest.raises(FiftyfoldError, match="not finite"):
        quantize_weight(weight, WeightSettings(1))
    for how in WEIGHTS:
        assert fake_quantize_weight(weight, how).isnan().any()


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(FiftyfoldError, match="group_size 3 does not divide the 8 inputs"):
        quantize_weight(random_weight(0), WeightSettings(1, "per_group", 3))
    with pytest.raises(FiftyfoldError, match="must be a matrix"):
        quantize_weight(torch.zeros(3), WeightSettings(1))


class _CudaDivision(TorchFunctionMode):
    """Divides by Python's numbers as torch does on CUDA: the product with the rounded reciprocal."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("__truediv__", "div", "divide", "true_divide", "div_") and not isinstance(args[1], torch.Tensor):
            return args[0] * float(1 / torch.tensor(args[1], dtype=args[0].dtype))
        return function(*args, **(kwargs or {}))


def test_a_gpus_division_by_a_number_changes_no_bit():
    x = torch.randn(400, 24)
    with _CudaDivision():
        assert not torch.equal(x / 127, x / torch.full_like(x, 127)), "the imitation shows what it is for"
    with use_path("reference"):
        for how in ACTIVATIONS:
            expected = fake_quantize_activation(x, how)
            with _CudaDivision():
                assert torch.equal(fake_quantize_activation(x, how), expected), how
        for how in WEIGHTS:
            codes, scale = quantize_weight(x, how)
            with _CudaDivision():
                found = quantize_weight(x, how)
            assert torch.equal(found[0], codes), how
            assert torch.equal(found[1], scale), how
