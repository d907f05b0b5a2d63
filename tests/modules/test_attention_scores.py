from __future__ import annotations

import math

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.attention_scores import attention_with_scores, capture_attention_scores, has_causal_attention
from tests.tiny import CAUSAL_FAMILIES, FAMILIES, tiny_batch, tiny_bert, tiny_causal, tiny_model


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    batch = tiny_batch(seed)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def eager(model, **batch):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model(**batch, output_attentions=True)
    model.set_attn_implementation(before)
    return output


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_output_is_eager_attentions_bit_for_bit(kind):
    model = tiny_model(kind)
    wanted = eager(model, **inputs())
    with capture_attention_scores(model) as scores:
        output = model(**inputs())
    assert torch.equal(output.logits, wanted.logits)
    assert list(scores) == [0, 1, 2, 3]
    assert all(layer.shape == (4, 4, 12, 12) for layer in scores.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_softmax_of_the_masked_scores_is_what_eager_attention_reports(kind):
    model, batch = tiny_model(kind), inputs()
    probabilities = eager(model, **batch).attentions
    with capture_attention_scores(model) as scores:
        model(**batch)
    allowed = batch["attention_mask"].bool()[:, None, None, :].expand(4, 1, 12, 12)
    if has_causal_attention(model):
        allowed = allowed & torch.ones(12, 12, dtype=torch.bool).tril()
    for layer, expected in zip(scores.values(), probabilities, strict=True):
        mine = layer.masked_fill(~allowed, float("-inf")).softmax(-1)
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", CAUSAL_FAMILIES)
def test_language_models(kind):
    model = tiny_causal(kind)
    wanted = eager(model, **inputs())
    with capture_attention_scores(model) as scores:
        output = model(**inputs())
    assert torch.equal(output.logits, wanted.logits)
    assert len(scores) == 4


def test_the_scores_are_queries_times_keys_over_the_root_of_the_width():
    model, batch = tiny_bert(layers=1), inputs()
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad(), capture_attention_scores(model) as scores:
        model(**batch)
        embedded = model.bert.embeddings(input_ids=batch["input_ids"])
        for head in range(4):
            columns = slice(8 * head, 8 * head + 8)
            query, key = attention.query(embedded)[..., columns], attention.key(embedded)[..., columns]
            expected = query.double() @ key.double().transpose(1, 2) / math.sqrt(8)
            torch.testing.assert_close(scores[0][:, head].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_scores_carry_gradients():
    model = tiny_bert(layers=2)
    with capture_attention_scores(model) as scores:
        model(**inputs())
    sum(layer.square().sum() for layer in scores.values()).backward()
    attention = model.bert.encoder.layer[1].attention.self
    assert attention.query.weight.grad.abs().sum() > 0
    assert attention.value.weight.grad is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropout_falls_as_in_eager_attention(kind):
    model = tiny_model(kind).train()
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.1
    torch.manual_seed(3)
    wanted = eager(model, **inputs()).logits
    torch.manual_seed(3)
    with capture_attention_scores(model):
        output = model(**inputs()).logits
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_the_layers_that_are_wanted_are_kept(kind):
    model = tiny_model(kind)
    with capture_attention_scores(model, [1, 3]) as some:
        model(**inputs())
    with capture_attention_scores(model) as every:
        model(**inputs())
    assert list(some) == [1, 3]
    assert torch.equal(some[3], every[3])


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = tiny_bert()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), capture_attention_scores(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    with capture_attention_scores(model):
        model(**inputs())
    assert model.config._attn_implementation == before


def test_two_models_do_not_mix():
    first, second = tiny_bert(seed=0), tiny_bert(layers=2, seed=1)
    with capture_attention_scores(first) as outer:
        first(**inputs())
        with capture_attention_scores(second) as inner:
            second(**inputs())
    assert (len(outer), len(inner)) == (4, 2)


def test_a_model_that_takes_another_way_is_reported():
    with pytest.raises(FiftyfoldError, match="attention_weight=0"), capture_attention_scores(tiny_bert()):
        pass


def test_gradient_checkpointing_is_refused():
    model = tiny_bert().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(FiftyfoldError, match="checkpointing"), capture_attention_scores(model):
        model(**inputs())


@pytest.mark.parametrize("kind", FAMILIES)
def test_decoders_are_told_from_encoders(kind):
    assert has_causal_attention(tiny_model(kind)) == (kind in CAUSAL_FAMILIES)


def test_an_attention_that_does_more_to_its_scores_is_refused():
    states = torch.randn(1, 2, 3, 4)
    attention_with_scores(torch.nn.Module(), states, states, states, None, softcap=None)
    with pytest.raises(FiftyfoldError, match="softcap"):
        attention_with_scores(torch.nn.Module(), states, states, states, None, softcap=50.0)
