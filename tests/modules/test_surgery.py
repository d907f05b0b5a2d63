"""Changing a model under its optimizer."""

from __future__ import annotations

import torch
from torch import nn

from fiftyfold.modules.surgery import (
    named_parameter_map,
    parameter_checksum,
    replace_module,
    update_optimizer,
)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_new_parameters_take_the_place_of_the_old():
    model = _model()
    outside = nn.Parameter(torch.zeros(1))
    decayed = {"params": [layer.weight for layer in model][::-1], "weight_decay": 0.1}
    plain = {"params": [outside, *(layer.bias for layer in model)], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, plain], lr=0.1)
    _step(model, optimizer)
    before, old = named_parameter_map(model), model[1]
    kept = optimizer.state[model[0].weight]["exp_avg"]
    model[1] = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
    update_optimizer(optimizer, before, named_parameter_map(model))
    weights, biases = (group["params"] for group in optimizer.param_groups)
    assert optimizer.state[model[0].weight]["exp_avg"] is kept
    assert old.weight not in optimizer.state
    held = {id(parameter) for parameter in (*weights, *biases)}
    assert held == {id(outside), *(id(parameter) for parameter in model.parameters())}
    assert (weights[0], weights[-1]) == (model[2].weight, model[0].weight)
    assert biases[0] is outside
    _step(model, optimizer)
    assert all(parameter in optimizer.state for parameter in model.parameters())


def test_nothing_lost_means_nothing_changed():
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer)
    before = [*optimizer.param_groups[0]["params"]]
    update_optimizer(optimizer, named_parameter_map(model), named_parameter_map(model))
    assert all(one is other for one, other in zip(before, optimizer.param_groups[0]["params"], strict=True))


def test_replacing_reaches_every_alias():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": shared, "deep": nn.ModuleDict({"two": shared})})
    new = nn.Linear(2, 2)
    replace_module(model, shared, new)
    assert model["one"] is model["deep"]["two"] is new


def test_the_checksum_notices_values_and_swaps():
    model = _model()
    checksum = parameter_checksum(model)
    assert torch.equal(checksum, parameter_checksum(_model()))
    first, second = model[0].bias, model[1].bias
    first.data, second.data = second.data, first.data
    swapped = parameter_checksum(model)
    assert not torch.equal(checksum, swapped)
    model[2].bias.data[0] += 1e-3
    assert not torch.equal(swapped, parameter_checksum(model))
