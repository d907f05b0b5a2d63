"""Hidden channels change places, and no output changes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from fiftyfold.modules import compress_matrices
from fiftyfold.modules.tensor_network import compressed_copy as module
from fiftyfold.modules.tensor_network.channel_order import (
    ChannelGroup,
    ChannelOrders,
    find_channel_groups,
    permute_bias_state,
    permute_channels,
    sort_channels,
)
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer
from fiftyfold.modules.tensor_network.targets import find_matrices
from tests.tiny import tiny_batch, tiny_causal, tiny_model

TEXT = [tiny_batch(seed) for seed in range(3)]

BLOCKS = {
    "bert": [
        (("attention.self.value",), "attention.output.dense", 8, 1),
        (("intermediate.dense",), "output.dense", 64, 1),
    ],
    "distilbert": [(("attention.v_lin",), "attention.out_lin", 8, 1), (("ffn.lin1",), "ffn.lin2", 64, 1)],
    "gpt2": [(("mlp.c_fc",), "mlp.c_proj", 128, 1)],
    "llama": [
        (("self_attn.v_proj",), "self_attn.o_proj", 8, 2),
        (("mlp.up_proj", "mlp.gate_proj"), "mlp.down_proj", 64, 1),
    ],
}


def always(gains=True):
    """Judges a matrix first as it is, then sorted."""
    answers = itertools.cycle([1.0, 0.0] if gains else [1.0, 1.0])
    return lambda *_: next(answers)


def model_of(kind):
    """Its weights are large enough for every layer to matter, and no bias is zero."""
    found = tiny_causal(kind) if kind in {"gpt2", "llama"} else tiny_model(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def outputs(model):
    with torch.no_grad():
        return [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in TEXT]


def assert_same_outputs(model, before, tolerance=1e-4):
    for found, expected in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_groups_of_each_block_are_found(kind):
    model = model_of(kind)
    names = find_matrices(model)
    stack = {name.split(".0.")[0] for name in names if ".0." in name}.pop()
    expected = [
        ChannelGroup(tuple(f"{stack}.{layer}.{name}" for name in writers), f"{stack}.{layer}.{reader}", head, repeats)
        for layer in range(4)
        for writers, reader, head, repeats in BLOCKS[kind]
    ]
    assert find_channel_groups(model, names, TEXT[0]) == expected


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_order_within_a_group_changes_no_output(kind):
    model = model_of(kind)
    before, orders = outputs(model), ChannelOrders()
    generator = torch.Generator().manual_seed(0)
    for group in find_channel_groups(model, find_matrices(model), TEXT[0]):
        rows = model.get_submodule(group.reader)
        inputs = rows.weight.shape[0 if kind == "gpt2" else 1]
        heads = torch.rand(inputs // group.repeats // group.head, group.head, generator=generator).argsort(1)
        order = (heads + torch.arange(len(heads)).unsqueeze(1) * group.head).flatten()
        orders.rows.update(dict.fromkeys(group.writers, order))
        orders.columns[group.reader] = group.at_reader(order)
    weights = copy.deepcopy(model.state_dict())
    permute_channels(model, orders)
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert_same_outputs(model, before)
    permute_channels(model, orders.inverse())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_strongest_channels_come_first(kind):
    model = model_of(kind)
    before = outputs(model)
    orders = sort_channels(model, find_matrices(model), TEXT, always())
    assert len(orders.columns) == 4 * len(BLOCKS[kind])
    assert_same_outputs(model, before)
    again = sort_channels(model, find_matrices(model), TEXT, always())
    for name, order in again.columns.items():
        assert torch.equal(order, torch.arange(len(order))), f"{name} was sorted"
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.columns.values())


def test_a_group_that_sorting_brings_no_nearer_stays_as_it_is():
    model = model_of("bert")
    before = copy.deepcopy(model.state_dict())
    assert not sort_channels(model, find_matrices(model), TEXT, always(gains=False)).rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_sorted_networks_stand_for_the_same_layers(kind, prefix, monkeypatch):
    """A layer that got the order of another would be off by as much as its outputs are large."""
    model, unsorted = model_of(kind), model_of(kind)
    before = outputs(model)
    arguments = {"keep": 0.9, "families": ("sum50",), "allocation": "uniform", "compressed_prefix": prefix}
    monkeypatch.setattr(module, "first_error", lambda _, __, *rest: judge(*rest))
    judge = always()
    compress_matrices(model, TEXT, **arguments)
    monkeypatch.setattr(module, "sort_channels", lambda *_, **__: ChannelOrders())
    compress_matrices(unsorted, TEXT, **arguments)

    def deviation(each):
        return sum(float((one - other).square().sum()) for one, other in zip(outputs(each), before, strict=True))

    zero = sum(float(each.square().sum()) for each in before)
    assert deviation(model) < min(1.5 * deviation(unsorted), 0.8 * zero)


def test_low_rank_alone_sorts_nothing(monkeypatch):
    monkeypatch.setattr(module, "sort_channels", lambda *_, **__: pytest.fail("it makes no difference"))
    compress_matrices(tiny_model("bert"), TEXT, 0.4, families=("svd",), allocation="uniform")


class Between(nn.Module):
    """Two layers whose shapes fit, and something between them."""

    def __init__(self, between):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def scaled_norm():
    norm = nn.LayerNorm(12)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(0))
    return norm


INPUTS = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("between", "head"),
    [
        (nn.ReLU(), 12),
        (nn.LayerNorm(12), 12),
        (nn.GroupNorm(3, 12, affine=False), 4),
        (nn.Softmax(-1), 12),
        (scaled_norm(), None),
        (nn.Sequential(nn.Unflatten(1, (2, 6)), nn.Softmax(1), nn.Flatten(1)), None),
    ],
    ids=str,
)
def test_what_stands_between_decides(between, head):
    model = Between(between).eval()
    groups = find_channel_groups(model, ["first", "second"], INPUTS)
    assert [group.head for group in groups] == ([] if head is None else [head])


def unsafe_models():
    twice = Between(nn.ReLU())
    twice.forward = lambda x: twice.second(twice.first(twice.second(twice.first(x))))
    tied = Between(nn.ReLU())
    tied.second.weight = tied.first.weight
    elsewhere = Between(nn.ReLU())
    elsewhere.between.register_forward_hook(lambda _, __, hidden: setattr(elsewhere, "kept", hidden.cumsum(-1)))
    elsewhere.register_forward_hook(lambda _, __, output: output + elsewhere.kept)
    residual = Between(nn.ReLU())
    residual.forward = lambda x: residual.second(residual.first(x) + x)
    watched = Between(nn.ReLU())
    watched.first.register_forward_hook(lambda *_: None)
    network = Between(nn.ReLU())
    compress_matrices(network, [INPUTS], 0.5, targets="first", allocation="uniform")
    assert isinstance(network.first, TensorNetworkLayer)
    parametrized = Between(nn.ReLU())
    nn.utils.parametrizations.weight_norm(parametrized.first)
    return {
        "called twice": twice,
        "tied": tied,
        "read elsewhere": elsewhere,
        "a residual": residual,
        "watched": watched,
        "a network": network,
        "parametrized": parametrized,
    }


@pytest.mark.parametrize("reason", list(unsafe_models()))
def test_what_is_not_safe_is_left_alone(reason):
    model = unsafe_models()[reason].eval()
    before = copy.deepcopy(model.state_dict())
    assert not sort_channels(model, ["first", "second"], [INPUTS], always()).rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_may_not_change_keeps_its_partners_channels():
    model = model_of("bert")
    names = [name for name in find_matrices(model) if "intermediate" not in name]
    assert not any("intermediate" in name for name in sort_channels(model, names, TEXT, always()).rows)


def test_lone_tokens_tell_no_heads_apart():
    model = model_of("bert")
    batch = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    assert not sort_channels(model, find_matrices(model), [batch], always()).rows


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_half_precision_finds_the_same(kind):
    model = model_of(kind)
    names = find_matrices(model)
    expected = find_channel_groups(model, names, TEXT[0])
    assert find_channel_groups(model.bfloat16(), names, TEXT[0]) == expected


def test_what_an_optimizer_keeps_of_a_bias_follows_it():
    model = Between(nn.ReLU())
    optimizer = torch.optim.Adam(model.parameters())
    model(INPUTS).square().sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[model.first.bias].items()}
    order = torch.arange(12).flip(0)
    permute_bias_state(model, ChannelOrders({"first": order}, {"second": order}), [optimizer])
    after = optimizer.state[model.first.bias]
    assert torch.equal(after["exp_avg"], before["exp_avg"].flip(0))
    assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"].flip(0))
    assert torch.equal(after["step"], before["step"])
