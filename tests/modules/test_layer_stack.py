"""Finding and cutting the stack of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.layer_stack import find_layer_stack, keep_layers
from tests.tiny import CAUSAL_FAMILIES, FAMILIES, tiny_batch, tiny_bert, tiny_causal, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bert", "bert.encoder.layer"),
        ("roberta", "roberta.encoder.layer"),
        ("distilbert", "distilbert.transformer.layer"),
        ("electra", "electra.encoder.layer"),
        ("gpt2", "transformer.h"),
        ("llama", "model.layers"),
    ],
)
def test_found_in_every_family(kind, name):
    assert find_layer_stack(tiny_model(kind)) == name


def test_a_frozen_teacher_is_not_taken():
    both = nn.ModuleDict({"teacher": tiny_bert(layers=6).requires_grad_(False), "student": tiny_bert(layers=2)})
    assert find_layer_stack(both) == "student.bert.encoder.layer"
    both.requires_grad_(False)
    assert find_layer_stack(both) == "teacher.bert.encoder.layer"


def test_experts_inside_layers_are_no_stack():
    layer = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    assert find_layer_stack(nn.ModuleDict({"blocks": nn.ModuleList([layer])})) == "blocks"


def test_models_without_one_stack_are_refused():
    with pytest.raises(FiftyfoldError, match="no list of layers"):
        find_layer_stack(nn.Sequential(nn.Linear(2, 2)))
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(FiftyfoldError, match="encoder"):
        find_layer_stack(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_kept_computes_as_a_model_built_of_those_layers(kind):
    model, batch = tiny_model(kind, layers=5), tiny_batch()
    weights = model.state_dict()
    stack = find_layer_stack(model)
    keep_layers(model, stack, [1, 2, 4])
    built = tiny_model(kind, layers=3, seed=7)
    for new, old in enumerate([1, 2, 4]):
        prefix = f"{stack}.{old}."
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        built.get_submodule(f"{stack}.{new}").load_state_dict(part)
    rest = {name: value for name, value in weights.items() if not name.startswith(f"{stack}.")}
    built.load_state_dict(rest, strict=False)
    assert torch.equal(model(**batch).logits, built(**batch).logits)
    assert model.config.num_hidden_layers == 3
    assert model.config.to_dict() == built.config.to_dict()


@pytest.mark.parametrize("kind", CAUSAL_FAMILIES)
def test_generation_after_layers_went(kind):
    """Layers find their cache by an index; with gaps in it generation fails."""
    model = tiny_causal(kind)
    keep_layers(model, find_layer_stack(model), [1, 3])
    tokens = torch.tensor([[5, 6, 7]])
    cached = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False))


def test_lists_in_the_configuration_follow():
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    keep_layers(model, "model.layers", [0, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


def test_a_shared_configuration_stays_as_it_is_for_others():
    config = tiny_config("bert")
    one, other = (type(tiny_bert())(config) for _ in range(2))
    keep_layers(one, find_layer_stack(one), [0])
    assert (one.config.num_hidden_layers, one.bert.encoder.config.num_hidden_layers) == (1, 1)
    assert other.config.num_hidden_layers == config.num_hidden_layers == 4


def test_works_without_memory():
    with torch.device("meta"):
        model = type(tiny_bert())(tiny_config("bert"))
    keep_layers(model, "bert.encoder.layer", [2])
    assert len(model.bert.encoder.layer) == 1
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "empty"),
        ([0, 4], "no layer 4"),
        ([-1], "no layer -1"),
        ([1, 0], "rise"),
        ([1, 1], "rise"),
        ([0.0], "whole"),
    ],
)
def test_impossible_lists(layers, message):
    model = tiny_bert()
    with pytest.raises(FiftyfoldError, match=message):
        keep_layers(model, "bert.encoder.layer", layers)
    assert len(model.bert.encoder.layer) == 4


@pytest.mark.parametrize(("name", "message"), [("bert.nothing", "no module"), ("bert.pooler", "ModuleList")])
def test_wrong_names(name, message):
    with pytest.raises(FiftyfoldError, match=message):
        keep_layers(tiny_bert(), name, [0])
