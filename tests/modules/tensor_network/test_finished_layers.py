"""Layers that are done with are not run again, and nothing else changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from fiftyfold.modules import compress_matrices
from fiftyfold.modules.tensor_network import compressed_copy as module
from fiftyfold.modules.tensor_network.finished_layers import FinishedLayers, finished_layers, same_layers
from tests.text import tiny_language_model, tokens


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return (x + self.inner(x).tanh(),)


class Stack(nn.Module):
    """Its layers write into what they are given, as some models' do, or one reads what an earlier one gave."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(5))
        self.skip = skip

    def forward(self, x):
        outputs = [x]
        for layer in self.layers:
            (x,) = layer(x)
            x.add_(1)
            outputs.append(x.clone())
        return x + outputs[2] if self.skip else x


@pytest.fixture
def batches():
    return [torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def calls_of(layers):
    counts = Counter()
    for index, layer in enumerate(layers):
        forward = layer.inner.forward
        layer.inner.forward = lambda x, index=index, forward=forward: (counts.update([index]), forward(x))[1]
    return counts


def test_each_layer_runs_when_its_turn_comes_and_the_outputs_stay(batches):
    model = Stack(skip=False).eval()
    keeper = finished_layers(model, lambda: model(batches[0]))
    expected = [model(batch) for batch in batches]
    counts = calls_of(model.layers)
    for layer in (0, 2, 2, 4, 1):
        for number, batch in enumerate(batches):
            with keeper.running([model.layers[layer].inner], number):
                assert torch.equal(model(batch), expected[number])
    # All for layers 0, 2 (the first time) and 1; then from the second layer on, twice.
    assert counts == {0: 6, 1: 6, 2: 10, 3: 10, 4: 10}
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.layers)


def test_what_a_layer_becomes_reaches_the_outputs(batches):
    model, reference = Stack(skip=False).eval(), Stack(skip=False).eval()
    keeper = finished_layers(model, lambda: model(batches[0]))
    for layer in model.layers:
        with torch.no_grad():
            layer.inner.weight.mul_(0.5)
        reference.load_state_dict(model.state_dict())
        with keeper.running([layer.inner], 0):
            assert torch.equal(model(batches[0]), reference(batches[0]))


def test_a_model_whose_layers_read_earlier_ones_runs_whole(batches):
    model = Stack(skip=True).eval()
    keeper = finished_layers(model, lambda: model(batches[0]))
    counts = calls_of(model.layers)
    for _ in range(2):
        with keeper.running([model.layers[4].inner], 0):
            model(batches[0])
    assert counts == dict.fromkeys(range(5), 2)
    with same_layers(keeper, copy.deepcopy(model)).running([model.layers[4].inner], 0):
        model(batches[0])
    assert counts[0] == 3


def test_an_error_leaves_the_layers_as_they_were(batches):
    model = Stack(skip=False).eval()
    keeper = FinishedLayers(list(model.layers))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes"), keeper.running([model.layers[3].inner], 0):
            model.layers[4](model(batches[0])[:, 1:])
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.layers)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_compression_is_the_same_with_fewer_calls(kind, monkeypatch):
    model = tiny_language_model(kind)
    plain, quick = copy.deepcopy(model), copy.deepcopy(model)
    compress_matrices(quick, [tokens(4), tokens(4)], 0.5, families=("svd",))
    monkeypatch.setattr(module, "finished_layers", lambda *_: FinishedLayers())
    compress_matrices(plain, [tokens(4), tokens(4)], 0.5, families=("svd",))
    for name, expected in plain.state_dict().items():
        assert torch.equal(quick.state_dict()[name], expected), name
