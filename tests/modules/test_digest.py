"""What tells one model or text from another."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.digest import digest_of, identity_of
from fiftyfold.modules.structure import attach_structure
from tests.tiny import tiny_model


def test_digests_tell_apart_what_differs_and_nothing_else():
    x = torch.arange(6)
    different = [x, x.float(), x.view(2, 3), x.flip(0), [x], {"a": x}, {"b": x}, [x, 1], "1", 1, [1, [2]], [[1], 2]]
    different += [np.arange(5000), np.arange(5000)[::-1], x.to("meta"), None, True, 1.0, b"1"]
    assert len({digest_of(value) for value in different}) == len(different)
    assert digest_of({"a": x, "b": 1}) == digest_of({"b": 1, "a": x.view(2, 3).t().t().reshape(6)})
    assert digest_of((1, 2)) == digest_of([1, 2])


@pytest.mark.parametrize("value", [object(), nn.Linear(1, 1), {1}])
def test_what_cannot_be_told_apart_is_refused(value):
    with pytest.raises(FiftyfoldError, match="nothing tells one"):
        digest_of([value])


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"rms_norm_eps": 0.1}, {"rope_parameters": 100.0}, "weight", "setting"]
)
def test_a_model_is_what_it_computes(change):
    model = tiny_model("llama")
    known = digest_of(identity_of(model))
    assert digest_of(identity_of(torch.compile(copy.deepcopy(model)).eval())) != digest_of(None)
    attach_structure(model)
    model.config._name_or_path = "elsewhere"
    assert digest_of(identity_of(model)) == known
    config = copy.deepcopy(model.config)
    if change == "setting":
        model.model.layers[0].self_attn.scaling *= 2
        assert digest_of(identity_of(model)) != known
        return
    if change == "weight":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-6
        assert digest_of(identity_of(model)) != known
        return
    for name, value in change.items():
        if name == "rope_parameters":
            config.rope_parameters = {**config.rope_parameters, "rope_theta": value}
        else:
            setattr(config, name, value)
    other = type(model)(config)
    other.load_state_dict(tiny_model("llama").state_dict())
    assert digest_of(identity_of(other)) != known
