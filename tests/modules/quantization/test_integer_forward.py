"""The integer forward product computes what the fake-quantized layer computes, and so do its gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fiftyfold.kernels import training
from fiftyfold.kernels.backends import backend_for
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.quantization import integer_forward
from fiftyfold.modules.quantization.layers import QuantizedLinear, activate
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings

pytestmark = pytest.mark.skipif(
    not training.is_fused(torch.ones(1)) or backend_for("cpu") is None, reason="there is no library for this processor"
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Take integers however small a layer is."""
    monkeypatch.setattr(integer_forward, "SMALLEST_WEIGHT", 0)


ACTIVATIONS = [
    ActivationSettings(),
    ActivationSettings(full_range=True),
    ActivationSettings(4, clip=0.9),
    ActivationSettings(16),
    ActivationSettings(range="static"),
]


def layer(bits=1, activation=ACTIVATIONS[0], granularity="per_tensor", clip=None, bias=True) -> QuantizedLinear:
    dense = nn.Linear(30, 17, bias=bias)
    group = 6 if granularity == "per_group" else None
    activate(dense, LayerSettings(WeightSettings(bits, granularity, group, clip), activation))
    assert isinstance(dense, QuantizedLinear)
    return dense


def run(module, x, path):
    """Return the output and all gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    with use_path(path):
        y = module(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def uses_integers(y: torch.Tensor) -> bool:
    return "_IntegerLinear" in str(y.grad_fn)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_outputs_and_gradients_are_the_references(bits, granularity, activation, clip):
    module = layer(bits, activation, granularity, clip)
    twin = copy.deepcopy(module)
    for seed in range(2):
        x = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(seed))
        assert uses_integers(module(x))
        twin(x)
        for found, expected in zip(run(module, x, "integer"), run(twin, x, "reference"), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    if activation.range == "static":
        assert torch.equal(module.activation_low, twin.activation_low)


def test_without_a_bias_and_for_frozen_parts():
    module = layer(bias=False)
    assert run(module, torch.randn(3, 30), "integer")[2].shape == (17, 30)
    module.zero_grad()
    module.weight.requires_grad_(False)
    x = torch.randn(3, 30, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    module = layer(2)
    x = torch.randn(4, 30)
    with torch.autocast("cpu", dtype):
        found = run(module, x, "integer")
        expected = run(module, x, "reference")
    assert found[0].dtype == expected[0].dtype == dtype
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bits", [1, 2])
def test_an_exported_layer_equals_the_trained_one_on_this_path_too(bits, activation):
    module = layer(bits, activation)
    module(torch.randn(5, 30))
    module.eval()
    packed = pack_layer("layer", module, packed_entry(module))
    x = torch.randn(3, 30)
    with torch.no_grad():
        assert torch.equal(module(x), packed(x))


@pytest.mark.parametrize(
    ("chosen", "x"),
    [
        (LayerSettings(WeightSettings(8), ActivationSettings()), torch.ones(2, 30)),
        (LayerSettings(WeightSettings(1), ActivationSettings(symmetric=False)), torch.ones(2, 30)),
        (LayerSettings(WeightSettings(1)), torch.ones(2, 30)),
        (LayerSettings(WeightSettings(1), ActivationSettings()), torch.ones(0, 30)),
    ],
)
def test_what_has_no_integer_form_takes_the_reference(chosen, x):
    module = nn.Linear(30, 17)
    activate(module, chosen)
    assert not uses_integers(module(x))


@pytest.mark.parametrize(
    ("shape", "tokens", "integers"), [((30, 17), 9, False), ((1024, 512), 1, True), ((512, 512), 32, True)]
)
def test_in_training_small_layers_take_the_reference(shape, tokens, integers, monkeypatch):
    monkeypatch.undo()
    module, x = nn.Linear(*shape), torch.randn(tokens, shape[0], requires_grad=True)
    activate(module, LayerSettings(WeightSettings(1), ActivationSettings()))
    y = module(x)
    assert uses_integers(y) == integers
    with torch.no_grad(), use_path("integer"):
        exact = module(x)
    assert torch.equal(exact, y) == integers
    packed = pack_layer("layer", module, packed_entry(module))
    with torch.no_grad():
        assert torch.equal(packed(x), exact)


def test_the_reference_path_is_kept_to():
    with use_path("reference"):
        assert not uses_integers(layer()(torch.ones(2, 30)))


def edits():
    """Ways in which a weight changes, each as (module, optimizer) -> None."""

    def step(module, optimizer):
        module(torch.ones(2, 30)).sum().backward()
        optimizer.step()

    def no_grad(module, _):
        with torch.no_grad():
            module.weight.neg_()

    def by_data(module, _):
        module.weight.data[3, 4] *= -1

    def swap_data(module, _):
        module.weight.data = -module.weight.data

    def new_parameter(module, _):
        module.weight = nn.Parameter(-module.weight.detach())

    def load(module, _):
        module.load_state_dict({name: -tensor for name, tensor in module.state_dict().items()})

    def other_settings(module, _):
        activate(module, LayerSettings(WeightSettings(2), ActivationSettings()))

    return [step, no_grad, by_data, swap_data, new_parameter, load, other_settings]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused", "foreach"])
def test_a_changed_weight_is_quantized_anew(edit, kind):
    module = layer()
    makers = {
        "sgd": lambda: torch.optim.SGD(module.parameters(), lr=10.0),
        "adamw": lambda: torch.optim.AdamW(module.parameters(), lr=1.0, foreach=False),
        "fused": lambda: torch.optim.AdamW(module.parameters(), lr=1.0, fused=True),
        "foreach": lambda: torch.optim.AdamW(module.parameters(), lr=1.0, foreach=True),
    }
    optimizer = makers[kind]()
    x = torch.randn(4, 30)
    before = module(x)
    edit(module, optimizer)
    after = module(x)
    with use_path("reference"):
        torch.testing.assert_close(after, module(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_a_weight_is_quantized_once_for_all_batches_between_two_steps(monkeypatch):
    calls = []
    original = training.quantize_weight
    monkeypatch.setattr(training, "quantize_weight", lambda *a, **k: calls.append(1) or original(*a, **k))
    module = layer()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            module(torch.randn(2, 30)).sum().backward()
        optimizer.step()
    assert len(calls) == 2


def test_copies_and_pickles_keep_nothing_of_what_is_kept():
    module = layer()
    module(torch.ones(2, 30))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert set(twin.__dict__) == set(layer().__dict__)
        assert torch.equal(twin(torch.ones(2, 30)), module(torch.ones(2, 30)))


def test_what_is_kept_goes_with_its_weight():
    before = len(integer_forward._kept)
    module = layer()
    module(torch.ones(2, 30))
    assert len(integer_forward._kept) == before + 1
    del module
    assert len(integer_forward._kept) == before


def test_a_changed_input_is_refused_as_a_dense_layer_refuses_it():
    x = torch.randn(2, 30, requires_grad=True) * 1.0
    y = layer()(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
