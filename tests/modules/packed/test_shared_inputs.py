"""Layers that read the same tensor as one product: which are joined, and that no bit changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fiftyfold
from fiftyfold.kernels.packing import pack_codes
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.packed import shared_inputs
from fiftyfold.modules.packed.compiled_program import output_tensors
from fiftyfold.modules.packed.layers import PackedLinear
from fiftyfold.modules.packed.shared_inputs import one_product_for_shared_inputs
from fiftyfold.modules.quantization.integer_product import multiply_integers
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings
from tests.kernels.examples import random_codes
from tests.modules.packed.examples import inputs, quantized
from tests.tiny import tiny_model


def packed(
    outputs: int = 24,
    bits: int = 1,
    *,
    bias: torch.dtype | None = torch.float32,
    group: int | None = None,
    seed: int = 0,
    **activation: Any,
) -> PackedLinear:
    weight = WeightSettings(bits, "per_group" if group else "per_channel", group)
    settings = LayerSettings(weight, ActivationSettings(**activation))
    generator = torch.Generator().manual_seed(seed)
    numbers = None if bias is None else nn.Parameter(torch.randn(outputs, generator=generator).to(bias))
    layer = PackedLinear(outputs, 32, settings, numbers)
    codes = torch.randint(1 - 2 ** (bits - 1), 2 ** (bits - 1), (outputs, 32), generator=generator, dtype=torch.int8)
    codes = random_codes(outputs, 32, bits, generator) if bits <= 2 else codes
    layer.weight.data = pack_codes(codes, bits)
    layer.weight_scale = torch.rand(outputs, 32 // group if group else 1, generator=generator).half()
    return layer.eval()


class Readers(nn.Module):
    """Layers that all read what the model is given."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [layer(x) for layer in self.layers]

    @torch.no_grad()
    def outputs(self) -> Sequence[torch.Tensor]:
        return self(self.x.clone())


def count_products(model: nn.Module) -> int:
    """How many products stand for layers at this moment."""
    replaced = [vars(layer).get("forward") for layer in model.modules()]
    return len({id(forward.func.__self__) for forward in replaced if isinstance(forward, partial)})


def products_of(model: Readers) -> int:
    """How many products stand for several layers; the outputs have the same bits meanwhile and afterwards."""
    before = model.outputs()
    with one_product_for_shared_inputs(model, model.outputs):
        found = count_products(model)
        assert all(map(torch.equal, model.outputs(), before))
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(map(torch.equal, model.outputs(), before))
    return found


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize(
    "how",
    [
        {"weight_bits": 1},
        {"weight_bits": 2, "granularity": "per_channel"},
        {"weight_bits": 1, "granularity": "per_group", "group_size": 8},
    ],
    ids=["binary", "ternary", "groups"],
)
@torch.no_grad()
def test_query_key_and_value_are_one_product(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    fiftyfold.export(quantized(tiny_model(kind, layers=2), **how), tmp_path / "small")
    model = fiftyfold.load(tmp_path / "small").eval()

    def call() -> Sequence[torch.Tensor]:
        return output_tensors(model(**inputs()))

    before = call()
    with one_product_for_shared_inputs(model, call):
        # LLaMA's gate and up read the same tensor too.
        assert count_products(model) == (4 if kind == "llama" else 2)
        assert all(map(torch.equal, call(), before))
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(map(torch.equal, call(), before))


def test_the_first_that_is_called_computes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def noting(x: torch.Tensor, arranged: tuple[torch.Tensor, torch.Tensor], *others: Any) -> torch.Tensor:
        rows.append(arranged[1].shape[1])
        return multiply_integers(x, arranged, *others)

    monkeypatch.setattr(shared_inputs, "multiply_integers", noting)
    model = Readers(packed(24), packed(40))
    with one_product_for_shared_inputs(model, model.outputs):
        rows.clear()
        model.outputs()
        assert rows == [64]
        model.outputs()
        assert rows == [64, 64]


@torch.no_grad()
def test_another_call_with_the_same_tensor_computes_anew() -> None:
    model = Readers(packed(), packed(seed=1))
    with one_product_for_shared_inputs(model, model.outputs):
        assert count_products(model) == 1
        model(model.x)
        model.x.mul_(-3)
        outputs = model(model.x)
    assert all(map(torch.equal, outputs, model(model.x)))


def test_layers_of_other_kinds_are_joined_with_their_like() -> None:
    assert products_of(Readers(packed(), packed(40, seed=1), packed(7, bias=None), packed(full_range=True))) == 1
    assert products_of(Readers(packed(), packed(bits=2), packed(7, seed=2), packed(9, bits=2))) == 2
    assert products_of(Readers(packed(bits=4), packed(9, bits=4, seed=1))) == 1
    assert products_of(Readers(packed(group=8), packed(9, group=8, seed=1))) == 1
    assert products_of(Readers(packed(bias=None), packed(9, bias=None, seed=1))) == 1


@pytest.mark.parametrize(
    "layers",
    [
        (packed(), packed(bits=2), packed(bias=None), packed(clip=0.5), packed(group=8), packed(bias=torch.bfloat16)),
        (packed(range="static"), packed(range="static")),
        (packed(symmetric=False), packed(symmetric=False)),
    ],
    ids=["different", "static", "asymmetric"],
)
def test_layers_that_quantize_otherwise_stay_alone(layers: Sequence[PackedLinear]) -> None:
    assert products_of(Readers(*layers)) == 0


def test_on_the_reference_path_all_stay_alone() -> None:
    with use_path("reference"):
        assert products_of(Readers(packed(), packed(seed=1))) == 0


def test_a_layer_that_is_called_twice_stays_alone() -> None:
    layer = packed()
    assert products_of(Readers(layer, layer, packed(seed=1))) == 0


def test_a_layer_that_somebody_wrapped_stays_alone_and_wrapped() -> None:
    wrapped = packed(seed=1)
    inner = wrapped.forward
    wrapped.forward = lambda x: inner(x) * 1.5  # type: ignore[method-assign]
    model = Readers(packed(), wrapped, packed(seed=2))
    before = model.outputs()
    with one_product_for_shared_inputs(model, model.outputs):
        assert count_products(model) == 1
    assert "forward" in vars(wrapped)
    assert all(map(torch.equal, model.outputs(), before))


def test_a_class_of_another_forward_stays_alone() -> None:
    class Doubling(PackedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layers = [packed(), packed(seed=1)]
    layers[1].__class__ = Doubling
    assert products_of(Readers(*layers)) == 0


class Chain(Readers):
    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [layer(x + place) for place, layer in enumerate(self.layers)]


class Apart(Readers):
    """Layers that read one tensor, with another's call in between, as blocks that all read the same encoder."""

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [self.layers[0](x), self.layers[1](x + 1), self.layers[2](x)]


class Clamping(Readers):
    """Changes its input in place, and with the example's numbers changes none of them."""

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [layer(x.clamp_(-100, 100)) for layer in self.layers]


class Flat(Readers):
    """Needs contiguous outputs, and says so by an error of its own."""

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = [layer(x) for layer in self.layers]
        if not all(output.is_contiguous() for output in outputs):
            raise ValueError
        return outputs


@pytest.mark.parametrize("kind", [Chain, Apart, Clamping, Flat])
def test_layers_that_cannot_be_joined_stay_alone(kind: type[Readers]) -> None:
    assert products_of(kind(packed(), packed(seed=1), packed(seed=2))) == 0


def test_tensors_that_count_no_changes_are_not_trusted() -> None:
    model = Readers(packed(), packed(seed=1))
    with torch.inference_mode():
        x = model.x.clone()
        with one_product_for_shared_inputs(model, lambda: model(x)):
            assert count_products(model) == 0


def test_a_group_that_fails_leaves_the_others_joined() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.flat = Readers(packed(), packed(seed=1)), Flat(packed(), packed(seed=2))

        def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
            return [*self.good(x), *self.flat(x + 1)]

    model = Both()
    with torch.no_grad(), one_product_for_shared_inputs(model, lambda: model(model.good.x)):
        assert count_products(model) == 1


def test_an_error_of_the_model_puts_its_layers_back() -> None:
    model = Readers(packed(), packed(seed=1))
    with pytest.raises(ZeroDivisionError), one_product_for_shared_inputs(model, model.outputs):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model.modules())
