"""Packed layers compute what quantized layers compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.path import current_path, use_path
from fiftyfold.kernels.table_linear import has_tables
from fiftyfold.modules.packed import layers
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.packed.layers import PackedLayer
from fiftyfold.modules.quantization.layers import QuantizedLayer, activate
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings

BITS = (1, 2, 3, 4, 8)
ACTIVATIONS = [
    None,
    ActivationSettings(),
    ActivationSettings(full_range=True),
    ActivationSettings(symmetric=False),
    ActivationSettings(bits=4, clip=0.7),
    ActivationSettings(range="static"),
    ActivationSettings(range="static", symmetric=False, clip=1.5),
]


@pytest.fixture
def fresh_compiler():
    """Compile as a process does that compiled nothing before, and leave it so; torch compiles one code 8 times."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(layer: nn.Module, chosen: LayerSettings) -> tuple[QuantizedLayer, PackedLayer]:
    activate(layer, chosen)
    layer.eval()
    assert isinstance(layer, QuantizedLayer)
    return layer, pack_layer("layer", layer, packed_entry(layer))


def linear_layer(kind: str, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=bias) if kind == "linear" else Conv1D(outputs, inputs)


def weights(bits: int, granularity: str) -> WeightSettings:
    return WeightSettings(bits, granularity, 6 if granularity == "per_group" else None)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_reference_path_equals_the_trained_layer(kind, bits, granularity, activation):
    trained, packed = pair(linear_layer(kind, 18, 7), LayerSettings(weights(bits, granularity), activation))
    trained.train()
    for _ in range(3):
        trained(torch.randn(5, 18))
    trained, packed = pair(trained, trained.settings)
    x = 2 * torch.randn(2, 3, 18)
    with use_path("reference"):
        assert torch.equal(packed(x), trained(x))


def test_a_static_range_that_observed_nothing_acts_as_in_the_trained_layer():
    chosen = LayerSettings(WeightSettings(), ActivationSettings(range="static", clip=1.0))
    trained, packed = pair(nn.Linear(8, 4), chosen)
    x = torch.randn(3, 8)
    with use_path("reference"):
        assert torch.equal(packed(x), trained(x))
    with torch.no_grad():
        assert torch.allclose(packed(x), trained(x), atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 5, 8, 13])
def test_an_embedding_unpacks_the_rows_it_looks_up(bits, width):
    trained, packed = pair(nn.Embedding(11, width, padding_idx=2), LayerSettings(weights(bits, "per_channel")))
    tokens = torch.tensor([[0, 10, 2], [2, 2, 7]])
    assert torch.equal(packed(tokens), trained(tokens))
    assert packed(tokens[:, :0]).shape == (2, 0, width)
    with pytest.raises(IndexError):
        packed(torch.tensor([11]))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 50),
    outputs=st.integers(1, 30),
    bits=st.sampled_from(BITS),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    full_range=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_integer_path_agrees_within_its_tolerance(rows, inputs, outputs, bits, granularity, full_range, bias, seed):
    torch.manual_seed(seed)
    chosen = LayerSettings(WeightSettings(bits, granularity), ActivationSettings(full_range=full_range))
    trained, packed = pair(linear_layer("linear", inputs, outputs, bias=bias), chosen)
    x = torch.randn(rows, inputs) * 10 ** torch.randn(rows, 1)
    with torch.no_grad():
        weight = packed.dense_weight().abs()
        bound = 1e-5 * (x.abs() @ weight.t() + (0 if packed.bias is None else packed.bias.abs())) + 1e-30
        assert bool(((packed(x) - trained(x)).abs() <= bound).all())


@pytest.mark.skipif(not has_tables(), reason="there is no library for this processor")
@pytest.mark.parametrize("activation", [None, ActivationSettings(symmetric=False)], ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.usefixtures("fresh_compiler")
def test_inputs_that_are_no_integers_are_multiplied_by_tables(kind, bits, granularity, activation):
    trained, packed = pair(linear_layer(kind, 50, 30), LayerSettings(weights(bits, granularity), activation))
    packed.forget_codes()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 50)
    with torch.no_grad():
        expected = trained(x)
        assert torch.allclose(packed(x), expected, atol=1e-5)
        assert packed._tabled is not None
        assert packed._codes is None  # nothing is held but what the product reads
        assert torch.equal(compiled(x), packed(x))
        with use_path("reference"):
            assert torch.equal(packed(x), expected)
            torch.compiler.reset()
            assert torch.equal(compiled(x), expected)
        packed.to(torch.bfloat16)
        assert packed._tabled is not None
        assert torch.allclose(packed(x.bfloat16()).float(), expected, atol=0.05)


@pytest.mark.skipif(not has_tables(), reason="there is no library for this processor")
def test_products_by_tables_see_new_bytes_and_leave_gradients_alone():
    chosen = LayerSettings(weights(2, "per_channel"))
    (_, packed), (_, other) = pair(nn.Linear(50, 30), chosen), pair(nn.Linear(50, 30), chosen)
    x = torch.randn(3, 50)
    with torch.no_grad():
        before = packed(x)
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(x), other(x))
        assert not torch.equal(packed(x), before)
    with_gradient = x.clone().requires_grad_()
    packed(with_gradient).sum().backward()
    assert torch.allclose(with_gradient.grad, packed.dense_weight().sum(0).expand(3, -1), atol=1e-5)


def test_the_integer_path_is_the_default_and_the_choice_can_be_undone(monkeypatch):
    calls = []
    _, packed = pair(nn.Linear(8, 4), LayerSettings(WeightSettings(), ActivationSettings()))
    monkeypatch.setattr(layers, "multiply_integers", lambda x, *_: calls.append(x) or x)
    x = torch.randn(2, 8)
    assert current_path() == "integer"
    with torch.no_grad():
        packed(x)
        with use_path("reference"):
            packed(x)
            assert current_path() == "reference"
        packed(x)
    assert len(calls) == 2
    with pytest.raises(FiftyfoldError, match="no arithmetic 'fast'"):
        use_path("fast")
    assert current_path() == "integer"


def test_use_path_lasts_without_a_block():
    use_path("reference")
    try:
        assert current_path() == "reference"
    finally:
        use_path("integer")


def test_gradients_pass_through_a_packed_layer_as_through_the_trained_one():
    trained, packed = pair(nn.Linear(8, 4), LayerSettings(WeightSettings(), ActivationSettings()))
    x = torch.randn(2, 8, requires_grad=True)
    with use_path("reference"):
        gradients = [torch.autograd.grad(layer(x).pow(2).sum(), x)[0] for layer in (trained, packed)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_scales_and_codes_alone(dtype):
    trained, packed = pair(nn.Linear(8, 4), LayerSettings(WeightSettings(), ActivationSettings(range="static")))
    scale = packed.weight_scale.clone()
    packed.to(dtype)
    assert packed.weight.dtype == torch.uint8
    assert packed.bias.dtype == dtype
    assert packed.activation_low.dtype == torch.float32
    assert packed.weight_scale.dtype == torch.float16
    assert torch.equal(packed.weight_scale, scale)
    x = torch.randn(2, 8, dtype=dtype)
    assert packed(x).dtype == dtype
    with use_path("reference"):
        assert torch.allclose(packed(x), trained.to(dtype)(x), rtol=0.02, atol=0.02)


def test_an_embedding_follows_the_type_of_its_model():
    _, packed = pair(nn.Embedding(5, 4), LayerSettings(weights(1, "per_channel")))
    assert packed(torch.tensor([1])).dtype == torch.float32
    assert packed.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    assert packed.float()(torch.tensor([1])).dtype == torch.float32


def test_new_bytes_take_the_place_of_remembered_codes():
    chosen = LayerSettings(WeightSettings(), ActivationSettings())
    (_, one), (_, other) = (pair(nn.Linear(8, 4), chosen) for _ in range(2))
    x = torch.randn(2, 8)
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_copies_and_pickles_compute_the_same_and_carry_no_remembered_codes():
    _, packed = pair(nn.Linear(64, 64), LayerSettings(WeightSettings(), ActivationSettings()))
    x = torch.randn(2, 64)
    expected = packed(x)
    assert len(pickle.dumps(packed)) < 64 * 64
    assert torch.equal(copy.deepcopy(packed)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)


@pytest.mark.parametrize("weight", [WeightSettings(), WeightSettings(1, "per_group", 32), WeightSettings(4)], ids=str)
@pytest.mark.parametrize("activation", [ActivationSettings(), None], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_copy_of_a_layer_that_is_ready_can_be_compiled(weight, activation):
    _, packed = pair(nn.Linear(64, 64), LayerSettings(weight, activation))
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = packed(x)
        copied = copy.deepcopy(nn.Sequential(packed))
        compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("activation", [ActivationSettings(), None], ids=str)
def test_what_an_earlier_version_pickled_computes(activation):
    _, packed = pair(nn.Linear(64, 64), LayerSettings(WeightSettings(), activation))
    earlier = type(packed).__new__(type(packed))
    earlier.__setstate__({name: value for name, value in packed.__getstate__().items() if name != "_tabled"})
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(earlier.to("cpu")(x), packed(x))


def test_an_embedding_that_renormalizes_cannot_be_packed():
    layer = nn.Embedding(5, 4, max_norm=1.0)
    activate(layer, LayerSettings(weights(1, "per_channel")))
    with pytest.raises(FiftyfoldError, match="max_norm"):
        pack_layer("embed", layer, packed_entry(layer))


def test_a_diverged_weight_cannot_be_packed():
    layer = nn.Linear(4, 4)
    activate(layer, LayerSettings(WeightSettings()))
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(FiftyfoldError, match=r"^proj: .*not finite"):
        pack_layer("proj", layer, packed_entry(layer))


@pytest.mark.parametrize("bits", BITS)
def test_weights_of_zero_and_constant_weights_survive(bits):
    for value in (0.0, -0.0, 0.25, 1e-40):
        layer = nn.Linear(6, 3)
        nn.init.constant_(layer.weight, value)
        trained, packed = pair(layer, LayerSettings(WeightSettings(bits, "per_channel"), ActivationSettings()))
        x = torch.randn(2, 6)
        with use_path("reference"):
            assert torch.equal(packed(x), trained(x))
        assert bool(packed(x).isfinite().all())


def test_its_description_names_the_bits():
    _, packed = pair(nn.Linear(8, 4), LayerSettings(WeightSettings(2), ActivationSettings()))
    assert "8, 4" in repr(packed)
    assert "bits=2" in repr(packed)


def test_an_embedding_looks_at_all_its_bytes_when_it_is_prepared():
    _, packed = pair(nn.Embedding(9, 7), LayerSettings(WeightSettings(2, "per_channel")))
    packed.prepare()
    packed.weight.data[-1] = 250
    with pytest.raises(FiftyfoldError, match="ternary codes is 250"):
        packed.prepare()
