"""The log of operations: written, travelling with the weights, replayed, refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import quantize, reduce_layers
from fiftyfold.modules.structure import (
    STATE_KEY,
    adopt_log,
    apply_operation,
    attach_structure,
    check_order,
    compression_root,
    decode_log,
    encode_log,
    listen,
    register_operation,
    replay,
    replaying,
    structure_log,
)
from tests.tiny import tiny_batch, tiny_bert


def test_a_state_dict_carries_the_log():
    model = tiny_bert()
    quantize(model, weight_bits=2)
    reduce_layers(model, [0, 2])
    assert decode_log(model.state_dict()[STATE_KEY]) == structure_log(model)
    fresh = tiny_bert(seed=1)
    listen(fresh)
    assert str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert structure_log(fresh) == structure_log(model)
    assert torch.equal(fresh(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_the_log_belongs_to_one_part():
    """Wherever the part stands in another model, names inside its log stay the same."""
    part = tiny_bert()
    reduce_layers(part, [1])
    whole = nn.ModuleDict({"deep": nn.ModuleDict({"er": part}), "other": nn.Linear(2, 2)})
    assert [key for key in whole.state_dict() if STATE_KEY in key] == [f"deep.er.{STATE_KEY}"]
    fresh = nn.ModuleDict({"deep": nn.ModuleDict({"er": tiny_bert(seed=1)}), "other": nn.Linear(2, 2)})
    with replaying():
        fresh.load_state_dict(whole.state_dict())
    assert len(fresh["deep"]["er"].bert.encoder.layer) == 1


def test_outside_the_block_nothing_listens():
    model = tiny_bert()
    reduce_layers(model, [1])
    with pytest.raises(ZeroDivisionError), replaying():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny_bert().load_state_dict(model.state_dict())


def test_a_model_without_operations_writes_what_it_always_wrote():
    plain, listening = tiny_bert(), tiny_bert()
    listen(listening)
    assert list(plain.state_dict()) == list(listening.state_dict())
    listening.load_state_dict(plain.state_dict())


def test_a_log_that_goes_on_is_replayed_from_where_the_model_is():
    model = tiny_bert()
    reduce_layers(model, [0, 1, 2])
    behind = copy.deepcopy(model)
    reduce_layers(model, [0, 2])
    behind.load_state_dict(model.state_dict())
    assert len(behind.bert.encoder.layer) == 2


def test_a_log_that_differs_is_refused():
    one, other = tiny_bert(), tiny_bert()
    reduce_layers(one, [0, 1])
    reduce_layers(other, [0, 2])
    with pytest.raises(FiftyfoldError, match="changed in another way"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(FiftyfoldError, match="no structure log"):
        one.load_state_dict(tiny_bert(layers=2).state_dict())


def test_a_model_of_another_size_is_refused():
    model = tiny_bert(layers=4)
    reduce_layers(model, [0, 1])
    with pytest.raises(FiftyfoldError, match="drops layers from 4, but the model has 3"):
        replay(tiny_bert(layers=3), structure_log(model))


def test_the_log_cannot_be_changed_from_outside():
    model = tiny_bert()
    reduce_layers(model, [0, 1])
    structure_log(model)[0]["layers"].append(9)
    assert structure_log(model)[0]["layers"] == [0, 1]
    twin = copy.deepcopy(model)
    reduce_layers(twin, [0])
    assert len(structure_log(model)) == 1


def test_a_failed_operation_leaves_no_entry():
    model = tiny_bert()
    with pytest.raises(FiftyfoldError, match="unknown operation"):
        apply_operation(model, {"op": "fold"})
    with pytest.raises(FiftyfoldError, match="no layer 9"):
        apply_operation(model, {"op": "reduce_layers", "stack": "bert.encoder.layer", "layers": [9], "of": 4})
    assert structure_log(model) == []


def test_orders_that_make_no_sense_are_refused():
    register_operation("test_first", lambda model, operation: None, forbidden_after=["quantize"])
    model = tiny_bert()
    quantize(model)
    with pytest.raises(FiftyfoldError, match="'test_first' cannot follow 'quantize'"):
        apply_operation(model, {"op": "test_first"})
    with pytest.raises(FiftyfoldError, match="cannot follow"):
        check_order([], ["reduce_layers", "quantize", "test_first"])
    check_order([], ["test_first", "quantize"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text().filter(lambda key: key != "op"), json_values), max_size=4))
def test_a_log_survives_its_tensor(entries):
    log = [{**entry, "op": "quantize"} for entry in entries]
    assert decode_log(encode_log(log)) == json.loads(json.dumps(log))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3), "list of bytes"),
        (torch.zeros(2, 2, dtype=torch.uint8), "list of bytes"),
        (torch.zeros(0, dtype=torch.uint8), "cannot be read"),
        (_bytes("{"), "cannot be read"),
        (_bytes("[]"), "cannot be read"),
        (_bytes("\x80"), "cannot be read"),
        (_bytes("[" * 100_000), "cannot be read"),
        (_bytes('{"version": 99, "operations": []}'), "version 99"),
        (_bytes('{"version": 1, "operations": {}}'), "not a list"),
        (_bytes('{"version": 1, "operations": [1]}'), "unknown operation"),
        (_bytes('{"version": 1, "operations": [{"op": "format_disk"}]}'), "format_disk"),
    ],
)
def test_corrupt_logs_are_refused(tensor, message):
    with pytest.raises(FiftyfoldError, match=message):
        decode_log(tensor)


@pytest.mark.parametrize(
    "entry",
    [{"op": "reduce_layers"}, {"op": "reduce_layers", "stack": 1, "layers": None, "of": 4}, {"op": ["quantize"]}, {}],
)
def test_corrupt_entries_are_refused(entry):
    state = {**tiny_bert().state_dict(), STATE_KEY: encode_log([entry])}
    with replaying(), pytest.raises(FiftyfoldError, match=r"corrupt|unknown"):
        tiny_bert().load_state_dict(state)


def test_adopting_changes_the_log_alone():
    model, source = tiny_bert(layers=2), tiny_bert(layers=4)
    reduce_layers(source, [0, 1])
    adopt_log(model, structure_log(source))
    assert structure_log(model) == structure_log(source)
    assert len(model.bert.encoder.layer) == 2


def test_which_part_carries_the_log():
    student, teacher = tiny_bert(), tiny_bert().requires_grad_(False)
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    assert compression_root(both) is student
    assert compression_root(student) is student
    two = nn.ModuleDict({"one": tiny_bert(), "two": tiny_bert()})
    assert compression_root(two) is two
    attach_structure(two["two"])
    assert compression_root(two) is two["two"], "a part that carries a log already stays the carrier"
    plain = nn.Sequential(nn.Linear(2, 2))
    assert compression_root(plain) is plain
    shared = nn.ModuleDict({"one": student, "again": student})
    assert compression_root(shared) is student
