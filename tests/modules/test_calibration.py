"""What training code calls the model with, and nothing of what it does then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.calibration import calls_of
from tests.strangers import OddUser
from tests.tiny import tiny_batch, tiny_bert

LAYERS = ["layers.0.up", "layers.5.down"]


def test_the_part_that_is_called_and_its_arguments_by_name():
    module = OddUser()
    part, calls = calls_of(
        module, [f"net.{name}" for name in LAYERS], [lambda: module._loss(1), lambda: module._loss(2)]
    )
    assert part == "net"
    expected = [tiny_batch(seed, vocab=20)["input_ids"] for seed in (1, 2)]
    assert all(list(call) == ["tokens"] for call in calls)
    assert all(torch.equal(call["tokens"], tokens) for call, tokens in zip(calls, expected, strict=True))


def test_the_outermost_part_counts_and_the_step_ends_there():
    model, after = tiny_bert(), []

    def step():
        model(**tiny_batch(3))
        after.append("the optimizer's step")

    part, calls = calls_of(model, ["bert.encoder.layer.0.output.dense"], [step])
    assert part == ""
    assert set(calls[0]) == {"input_ids", "attention_mask", "labels"}
    assert not after
    assert not model._forward_pre_hooks


def test_keyword_arguments_without_a_name_of_their_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, **options):
            return self.linear(x) * options["scale"]

    net = Net()
    assert set(calls_of(net, ["linear"], [lambda: net(torch.ones(1, 2), scale=2)])[1][0]) == {"x", "scale"}


def test_no_part_holds_all_layers():
    module = OddUser()
    with pytest.raises(FiftyfoldError, match="calls no module that holds all"):
        calls_of(module, ["net.layers.0.up"], [lambda: module.net.embed(torch.tensor([1]))])


def test_no_batch():
    with pytest.raises(FiftyfoldError, match="training data are empty"):
        calls_of(OddUser(), ["net.layers.0.up"], [])
