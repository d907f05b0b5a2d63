"""Layers that read the same tensor as one product: which are joined, and that no bit changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fiftyfold
from fiftyfold.kernels.packing import pack_codes
from fiftyfold.modules.packed.compiled_program import output_tensors
from fiftyfold.modules.packed.layers import PackedLinear
from fiftyfold.modules.packed.shared_inputs import one_product_for_shared_inputs
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings
from tests.kernels.examples import random_codes
from tests.modules.packed.examples import inputs, quantized
from tests.tiny import tiny_model


def packed(outputs: int = 24, bits: int = 1, *, bias: bool = True, seed: int = 0, **activation: Any) -> PackedLinear:
    settings = LayerSettings(WeightSettings(bits, "per_channel"), ActivationSettings(**activation))
    layer = PackedLinear(outputs, 32, settings, nn.Parameter(torch.randn(outputs)) if bias else None)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = pack_codes(random_codes(outputs, 32, bits, generator), bits)
    layer.weight_scale = torch.rand(outputs, 1, generator=generator).half()
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


def products_of(model: Readers) -> int:
    """How many products stand for several layers; the outputs have the same bits meanwhile and afterwards."""
    before = model.outputs()
    with one_product_for_shared_inputs(model, model.outputs) as found:
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
    with one_product_for_shared_inputs(model, call) as found:
        # LLaMA's gate and up read the same tensor too.
        assert found == (4 if kind == "llama" else 2)
        assert all(map(torch.equal, call(), before))
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert all(map(torch.equal, call(), before))


def test_the_first_that_is_called_computes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = PackedLinear.forward

    def noting(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append(layer.rows)
        return compute(layer, x)

    monkeypatch.setattr(PackedLinear, "forward", noting)
    model = Readers(packed(24), packed(40))
    with one_product_for_shared_inputs(model, model.outputs):
        calls.clear()
        model.outputs()
        assert calls == [64]
        model.outputs()
        assert calls == [64, 64]


def test_layers_that_quantize_otherwise_stay_alone() -> None:
    assert products_of(Readers(packed(), packed(40, seed=1), packed(7, bias=False), packed(full_range=True))) == 1
    assert products_of(Readers(packed(), packed(bits=2), packed(bias=False), packed(clip=0.5))) == 0
    assert products_of(Readers(packed(), packed(bits=2), packed(7), packed(9, bits=2))) == 2
    assert products_of(Readers(packed(range="static"), packed(range="static"))) == 0


def test_a_layer_that_is_called_twice_stays_alone() -> None:
    layer = packed()
    assert products_of(Readers(layer, layer, packed(seed=1))) == 0


def test_layers_that_read_different_tensors_stay_alone() -> None:
    class Chain(Readers):
        def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
            return [layer(x + place) for place, layer in enumerate(self.layers)]

    assert products_of(Chain(packed(), packed())) == 0


def test_a_model_that_needs_contiguous_outputs_is_left_as_it_is() -> None:
    class Flat(Readers):
        def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
            return [layer(x).view(-1) for layer in self.layers]

    assert products_of(Flat(packed(), packed(seed=1))) == 0


def test_a_model_that_changes_the_tensor_in_between_is_left_as_it_is() -> None:
    class Changing(Readers):
        def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
            return [layer(x.add_(1)) for layer in self.layers]

    assert products_of(Changing(packed(), packed(seed=1))) == 0


def test_an_error_of_the_model_puts_its_layers_back() -> None:
    model = Readers(packed(), packed(seed=1))
    with pytest.raises(ZeroDivisionError), one_product_for_shared_inputs(model, model.outputs):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model.modules())
