"""Measuring layers, and dropping the least important."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import prune_layers
from fiftyfold.modules.layer_pruning import ImportanceMeter, measure_importance
from fiftyfold.modules.structure import structure_log
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_model


@pytest.mark.parametrize("kind", FAMILIES)
def test_importance_is_that_of_the_paper(kind):
    """Written again in float64 from the hidden states that the model itself returns."""
    model = tiny_model(kind)
    batches = [{key: value for key, value in tiny_batch(seed).items() if key != "labels"} for seed in range(3)]
    measured = measure_importance(model, batches)
    cosines, tokens = torch.zeros(4, dtype=torch.float64), 0
    for batch in batches:
        # The last one that a decoder returns has gone through its final normalization.
        hidden = model(**batch, output_hidden_states=True).hidden_states
        real = batch["attention_mask"].bool()
        tokens += int(real.sum())
        for layer in range(3 if kind in ("gpt2", "llama") else 4):
            before, after = hidden[layer][real].double(), hidden[layer + 1][real].double()
            cosines[layer] += F.cosine_similarity(before, after, dim=-1).sum()
    expected = (1 - cosines / tokens).tolist()
    compared = 3 if kind in ("gpt2", "llama") else 4
    assert measured[:compared] == pytest.approx(expected[:compared], abs=1e-6)


def test_padding_does_not_count():
    model, batch = tiny_bert(), tiny_batch()
    del batch["labels"]
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 50, batch["input_ids"])}
    assert measure_importance(model, [batch]) == pytest.approx(measure_importance(model, [changed]), abs=1e-6)
    with_padding = {"input_ids": batch["input_ids"]}
    assert measure_importance(model, [with_padding]) != pytest.approx(measure_importance(model, [batch]), abs=1e-6)


def test_the_order_of_batches_does_not_matter():
    """Sums are whole numbers: a resumed or distributed run decides as any other, bit by bit."""
    model = tiny_bert()
    batches = [tiny_batch(seed) for seed in range(5)]
    assert measure_importance(model, batches) == measure_importance(model, batches[::-1])


def test_the_model_is_left_as_it_was():
    model = tiny_bert().train()
    model.bert.pooler.eval()
    measure_importance(model, [tiny_batch()])
    assert model.training
    assert not model.bert.pooler.training
    assert all(not layer._forward_hooks for layer in model.bert.encoder.layer)


def test_the_least_important_layers_go():
    model = tiny_bert()
    assert prune_layers(model, 2, [0.3, 0.1, 0.4, 0.2], step=7) == [0, 2]
    assert structure_log(model) == [
        {
            "op": "reduce_layers",
            "stack": "bert.encoder.layer",
            "layers": [0, 2],
            "of": 4,
            "importance": [0.3, 0.1, 0.4, 0.2],
            "step": 7,
        }
    ]
    assert prune_layers(tiny_bert(), 1, [0.1, 0.1, 0.1, 0.1]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("drop", "importance", "message"),
    [(4, [0.1] * 4, "1 to 3"), (0, [0.1] * 4, "1 to 3"), (1, [0.1] * 3, "one a layer")],
)
def test_impossible_prunings(drop, importance, message):
    with pytest.raises(FiftyfoldError, match=message):
        prune_layers(tiny_bert(), drop, importance)


def test_without_batches_nothing_is_known():
    with pytest.raises(FiftyfoldError, match="measured"):
        measure_importance(tiny_bert(), [])


def test_totals_go_on_where_they_were_kept():
    model, batches = tiny_bert(), [tiny_batch(seed) for seed in range(2)]
    whole, first, second = (ImportanceMeter(model.bert.encoder.layer) for _ in range(3))
    whole.active = first.active = True
    model(**batches[0])
    first.active, second.active = False, True
    second.totals = first.totals
    model(**batches[1])
    assert torch.equal(second.totals, whole.totals)
