"""Linear layers in bitsandbytes' codes: near the dense ones, exported, reloaded, refused where they cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fiftyfold
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, quantize_bitsandbytes, tensorize
from fiftyfold.modules.quantization.bitsandbytes_layers import BitsandbytesLinear
from fiftyfold.modules.structure import structure_log
from tests.text import tiny_language_model, tokens

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.12)])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (7, 9), (130, 3)])
def test_the_codes_stand_for_the_weight(bits, error, inputs, outputs):
    model = nn.Sequential(nn.Linear(inputs, outputs))
    x = torch.randn(2, 3, inputs)
    expected, weight = model(x), model[0].weight.detach().clone()
    assert quantize_bitsandbytes(model, bits) == ["0"]
    layer = model[0]
    assert isinstance(layer, BitsandbytesLinear)
    assert float((layer.dense_weight(torch.float32) - weight).norm() / weight.norm()) < error
    assert layer.weight.dim() == 1
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.dense_weight(torch.float32), layer.bias))
    assert float((model(x) - expected).norm() / expected.norm()) < 2 * error


@pytest.mark.parametrize("bits", [8, 4])
def test_an_export_reloads_with_equal_outputs_and_generates(tmp_path, bits):
    model = tiny_language_model(hidden=64)
    tensorize(model, cores=2, keep=0.4, targets="q_proj")
    names = quantize_bitsandbytes(model, bits, exclude="lm_head|k_proj")
    assert not any("q_proj" in name or "k_proj" in name for name in names)
    report = export(model, tmp_path / "out")
    assert report.outputs_equal
    assert report.parameters == sum(p.numel() for p in tiny_language_model(hidden=64).parameters())
    for loaded in (fiftyfold.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert structure_log(loaded) == structure_log(model)
        text = tokens(1, 6)
        kept = [m.generate(text, max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (model, loaded)]
        assert torch.equal(*kept)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


def test_a_checkpoint_resumes_into_the_codes():
    model, other = tiny_language_model(), tiny_language_model(seed=3)
    quantize_bitsandbytes(model, 8)
    from fiftyfold.modules.structure import attach_structure

    attach_structure(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_tied_weights_are_left_alone():
    model = tiny_language_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    assert "lm_head" not in quantize_bitsandbytes(model, 8)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (tiny_language_model, {"bits": 3}, "4 or 8 bits"),
        (tiny_language_model, {"targets": "absent"}, "absent"),
        (tiny_language_model, {"targets": "q_proj", "exclude": "proj"}, "leave nothing"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "no dense linear layer"),
    ],
)
def test_what_cannot_be_quantized_is_refused(model, arguments, message):
    with pytest.raises(FiftyfoldError, match=message):
        quantize_bitsandbytes(model(), **arguments)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_language_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    before = str(model)
    with pytest.raises(FiftyfoldError, match="not finite"):
        quantize_bitsandbytes(model)
    assert str(model) == before


def test_a_corrupt_log_is_refused(tmp_path):
    model = tiny_language_model()
    quantize_bitsandbytes(model, 8)
    export(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["structure"][0]["bits"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(FiftyfoldError, match="5 bits"):
        fiftyfold.load(tmp_path / "out")
