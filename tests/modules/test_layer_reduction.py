"""Choosing layers, and students made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import reduce_layers
from fiftyfold.modules.layer_reduction import choose_layers, student_from_teacher, surviving_layers
from fiftyfold.modules.structure import structure_log
from tests.tiny import tiny_batch, tiny_bert


@pytest.mark.parametrize(
    ("layers", "total", "keep", "chosen"),
    [
        ("every-other", 12, 6, [1, 3, 5, 7, 9, 11]),
        ("every-other", 12, 5, [2, 4, 6, 8, 10]),
        ("every-other", 12, 4, [2, 5, 8, 11]),
        ("every-other", 6, None, [1, 3, 5]),
        ("every-other", 12, 8, [0, 2, 3, 5, 6, 8, 9, 11]),
        ("every-other", 1, None, [0]),
        ("first", 12, 3, [0, 1, 2]),
        ("last", 12, None, [6, 7, 8, 9, 10, 11]),
        ([0, 5], 6, None, [0, 5]),
        ([0, 5], 6, 2, [0, 5]),
    ],
)
def test_choices(layers, total, keep, chosen):
    assert choose_layers(layers, total, keep) == chosen


@given(st.data(), st.sampled_from(["every-other", "first", "last"]), st.integers(1, 48))
def test_named_choices_are_always_possible(data, name, total):
    keep = data.draw(st.integers(1, total))
    chosen = choose_layers(name, total, keep)
    assert len(chosen) == keep
    assert sorted(set(chosen)) == chosen
    assert chosen[0] >= 0
    assert chosen[-1] < total


@given(st.data(), st.integers(2, 48))
def test_every_other_is_even(data, total):
    """No two neighbours lie much further apart than any other two."""
    chosen = choose_layers("every-other", total, data.draw(st.integers(2, total)))
    steps = [second - first for first, second in itertools.pairwise(chosen)]
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [
        ("middle", None, "unknown choice"),
        ("first", 0, "keep 1 to 4"),
        ("last", 5, "keep 1 to 4"),
        ([0, 1], 3, "contra"),
    ],
)
def test_impossible_choices(layers, keep, message):
    with pytest.raises(FiftyfoldError, match=message):
        choose_layers(layers, 4, keep)


def test_a_student_shares_nothing_with_its_teacher():
    teacher = tiny_bert().requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = student_from_teacher(teacher, [1, 3])
    assert student.training
    assert not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert structure_log(student) == []
    for new, old in enumerate([1, 3]):
        for name, value in student.bert.encoder.layer[new].state_dict().items():
            assert torch.equal(value, before[f"bert.encoder.layer.{old}.{name}"])
    for name in ("bert.embeddings", "bert.pooler", "classifier"):
        for key, value in student.get_submodule(name).state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == 4


def test_a_student_does_not_inherit_what_was_done_to_its_teacher():
    teacher = tiny_bert(layers=6)
    reduce_layers(teacher, [1, 3, 5])
    student = student_from_teacher(teacher, [0, 2])
    reduce_layers(student, [1])
    assert surviving_layers(structure_log(student), 2) == [1]
    assert len(structure_log(teacher)) == 1


def test_the_optimizer_forgets_what_is_gone():
    model = tiny_bert().train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.bert.pooler.named_parameters()}
    assert reduce_layers(model, "first", 1, optimizer=optimizer) == [0]
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    for name, parameter in model.bert.pooler.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])


def test_reductions_compose():
    model = tiny_bert(layers=6)
    reduce_layers(model)
    reduce_layers(model, [0, 2], step=5)
    assert surviving_layers(structure_log(model), 6) == [1, 5]
    assert surviving_layers([], 3) == [0, 1, 2]
