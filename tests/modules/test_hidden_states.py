from __future__ import annotations

import pickle

import pytest
import torch

from fiftyfold.modules.hidden_states import capture_hidden_states
from tests.tiny import CAUSAL_FAMILIES, FAMILIES, tiny_batch, tiny_bert, tiny_model


def inputs() -> dict[str, torch.Tensor]:
    batch = tiny_batch()
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("kind", FAMILIES)
def test_they_are_those_of_transformers(kind):
    model = tiny_model(kind)
    with capture_hidden_states(model) as states:
        model(**inputs())
    wanted = model(**inputs(), output_hidden_states=True).hidden_states
    assert list(states) == [0, 1, 2, 3, 4]
    for number, expected in enumerate(wanted):
        last_is_normalised = kind in CAUSAL_FAMILIES and number == 4
        assert torch.equal(states[number], expected) != last_is_normalised


def test_the_last_state_of_a_decoder_is_what_its_norm_receives():
    model = tiny_model("llama")
    with capture_hidden_states(model) as states:
        model(**inputs())
    last = model(**inputs(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.model.norm(states[4]), last)


def test_only_the_states_that_are_wanted_are_kept():
    model = tiny_bert()
    with capture_hidden_states(model, [0, 3], stack="bert.encoder.layer") as states:
        model(**inputs())
    assert list(states) == [0, 3]


def test_nothing_stays_on_the_model():
    model = tiny_bert()
    with capture_hidden_states(model):
        model(**inputs())
    layers = model.bert.encoder.layer
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    pickle.loads(pickle.dumps(layers))
