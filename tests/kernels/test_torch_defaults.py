"""What kernels write into has the type and the device that they write, whatever torch would make by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fiftyfold.kernels import training
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.quantization.layers import activate
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings

pytestmark = pytest.mark.skipif(not training.is_fused(torch.ones(1)), reason="there is no library for this processor")


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(settings: LayerSettings) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(768, 768)
    activate(layer, settings)
    return layer.train(), torch.randn(33, 768)


def train(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(y.detach())
    assert x.grad is not None
    assert layer.weight.grad is not None
    return [y.detach(), x.grad, layer.weight.grad]


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
@pytest.mark.parametrize("weight", [WeightSettings(1), WeightSettings(2, "per_group", 64), WeightSettings(4)])
def test_they_change_nothing(dtype, device, weight):
    settings = LayerSettings(weight, ActivationSettings())
    (layer, x), (other, _) = build(settings), build(settings)
    expected = train(layer, x)
    packed = pack_layer("layer", layer, packed_entry(layer)).eval()
    again = pack_layer("layer", layer, packed_entry(layer)).eval()
    with torch.no_grad():
        expected.append(packed(x))
        with defaults(dtype, device):
            deployed = again(x)
    with defaults(dtype, device):
        found = [*train(other, x), deployed]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.device.type == "cpu"
        assert torch.equal(a, b)
