"""Whatever the callbacks make of a module in training, the exported folder gives it back."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fiftyfold.kernels.path import use_path
from fiftyfold.modules import export, load
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.packed.layers import PackedLayer
from fiftyfold.modules.structure import compression_root, structure_log
from tests.cases import CASES
from tests.strangers import BertUser, OddUser, make_trainer
from tests.tiny import tiny_batch


def batch(vocab: int) -> dict[str, torch.Tensor]:
    found = tiny_batch(77, vocab=vocab)
    del found["labels"]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trained_transformers_model(case, tmp_path):
    module = BertUser()
    make_trainer(case.callbacks()).fit(module)
    round_rest(module)
    report = export(module, tmp_path / "out")
    assert report.outputs_equal is True
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert structure_log(loaded) == structure_log(module.model)
    module.eval()
    with torch.no_grad(), use_path("reference"):
        expected = module.model(**batch(50)).logits
        assert torch.equal(loaded(**batch(50)).logits, expected)
        assert torch.equal(load(tmp_path / "out", trainable=True)(**batch(50)).logits, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trained_strangers_model(case, tmp_path):
    module = OddUser()
    make_trainer(case.callbacks()).fit(module)
    round_rest(module)
    export(module, tmp_path / "out")
    fresh = OddUser(seed=1)
    load(tmp_path / "out", into=fresh)
    assert structure_log(compression_root(fresh)) == structure_log(compression_root(module))
    assert fresh.blocks is fresh.net.layers
    packed = [isinstance(layer, PackedLayer) for layer in (fresh.net.tied, fresh.net.embed)]
    assert (fresh.net.tied.weight is fresh.net.embed.weight) is (packed[0] is packed[1])
    tokens = batch(20)["input_ids"]
    module.eval()
    with torch.no_grad(), use_path("reference"):
        for found, expected in zip(fresh.net(tokens), module.net(tokens), strict=True):
            assert torch.equal(found, expected)
