from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fiftyfold.modules.teacher import FrozenTeacher
from tests.modules.training import same_weights
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_model


def inputs() -> dict[str, torch.Tensor]:
    batch = tiny_batch()
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_shows_what_was_asked_for_and_no_more(kind):
    teacher = FrozenTeacher(tiny_model(kind))
    seen = teacher(inputs(), hidden=[0, 4], attention=[1])
    assert list(seen.hidden) == [0, 4]
    assert list(seen.attention) == [1]
    assert not seen.logits.requires_grad
    torch.testing.assert_close(seen.logits, tiny_model(kind)(**inputs()).logits)
    plain = teacher(inputs())
    assert (plain.hidden, plain.attention) == ({}, {})


def test_it_is_frozen_and_stays_in_evaluation_mode():
    model = tiny_bert().train()
    teacher = FrozenTeacher(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert torch.equal(teacher(inputs()).logits, teacher(inputs()).logits)
    assert not model.training


def test_a_copy_of_its_owner_shares_it():
    teacher = FrozenTeacher(tiny_bert())
    assert copy.deepcopy({"teacher": teacher})["teacher"] is teacher


def test_another_process_gets_its_own():
    teacher = FrozenTeacher(tiny_bert())
    received = pickle.loads(pickle.dumps(teacher))
    assert same_weights(received.model, teacher.model)


@pytest.mark.parametrize(("precision", "kind", "tolerance"), [("8bit", torch.int8, 0.02), ("4bit", torch.uint8, 0.2)])
def test_bitsandbytes_holds_the_backbone(precision, kind, tolerance):
    wanted = tiny_bert(hidden=64)(**inputs()).logits
    teacher = FrozenTeacher(tiny_bert(hidden=64), precision)
    seen = teacher(inputs(), hidden=[4], attention=[0])
    attention = teacher.model.bert.encoder.layer[0].attention.self
    assert attention.query.weight.dtype == kind
    assert teacher.model.classifier.weight.dtype == torch.float32
    assert 0 < (seen.logits.float() - wanted).abs().max() < tolerance
    # Attention whose scores are seen is computed in another order, where the processor has two.
    torch.testing.assert_close(teacher(inputs()).logits, seen.logits, rtol=1e-5, atol=1e-6)
