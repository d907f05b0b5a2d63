from __future__ import annotations

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import DistillationModule
from fiftyfold.modules.dropout import set_dropout
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_causal, tiny_model


def outputs(model, batch):
    torch.manual_seed(0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return [model(**inputs).logits for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_without_it_computes_the_same_twice(family):
    model = tiny_model(family).train()
    set_dropout(model, 0.5)
    first, second = outputs(model, tiny_batch())
    assert not torch.equal(first, second)
    set_dropout(model, 0.0)
    first, second = outputs(model, tiny_batch())
    assert torch.equal(first, second)
    left = [value for name, value in model.config.to_dict().items() if "drop" in name and isinstance(value, float)]
    assert not any(left)


def test_a_decoder_whose_attention_is_handed_a_number():
    model = tiny_causal("llama").train()
    set_dropout(model, 0.5)
    assert model.config.attention_dropout == 0.5
    first, second = outputs(model, {"input_ids": torch.arange(1, 13)[None]})
    assert not torch.equal(first, second)


def test_the_student_alone_is_changed():
    teacher = tiny_bert()
    own = teacher.config.hidden_dropout_prob
    module = DistillationModule(teacher, dropout=0.0)
    assert module.student.config.hidden_dropout_prob == 0.0
    assert module.teacher.config.hidden_dropout_prob == own > 0
    assert module.hparams["dropout"] == 0.0


def test_impossible_probabilities():
    for probability in (-0.1, 1.0, float("nan")):
        with pytest.raises(FiftyfoldError, match="at least 0 and below 1"):
            DistillationModule(tiny_bert(), dropout=probability)
