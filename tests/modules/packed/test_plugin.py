"""Exported folders open with transformers alone, once fiftyfold is imported, and fail loudly before."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    pipeline,
)

import fiftyfold
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.path import use_path
from fiftyfold.modules import export, load, quantize, reduce_layers, tensorize
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.packed.layers import PackedLayer
from fiftyfold.modules.packed.plugin import register_plugin
from fiftyfold.modules.quantization.layers import QuantizedLayer, codes_and_scale, quantized_layers
from fiftyfold.modules.structure import STATE_KEY, structure_log
from tests.modules.packed.examples import Encoder, inputs, logits, quantized, tiny_tokenizer
from tests.tiny import FAMILIES, tiny_bert, tiny_causal, tiny_config, tiny_model


@pytest.fixture
def model():
    model = tiny_bert(layers=3, labels=3)
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    reduce_layers(model, layers=[0, 2])
    quantized(model)
    round_rest(model)
    return model


@pytest.fixture
def folder(model, tmp_path):
    export(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    return tmp_path / "out"


@pytest.mark.parametrize("cls", [AutoModelForSequenceClassification, BertForSequenceClassification])
def test_from_pretrained_gives_the_trained_models_outputs(folder, model, cls):
    loaded, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    assert structure_log(loaded) == structure_log(model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_loads_without_a_word_of_missing_tensors(tmp_path, kind):
    export(quantized(tiny_model(kind)), tmp_path / "out")
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_language_models_load_and_generate(tmp_path, kind, tie):
    config = tiny_config(kind)
    config.tie_word_embeddings = tie
    model = quantized(AutoModelForCausalLM.from_config(config).eval(), targets="")
    export(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(loaded))


def test_a_masked_language_model_keeps_its_tie(tmp_path):
    config = tiny_config("bert")
    model = quantized(BertForMaskedLM(config).eval(), targets=["embeddings", "encoder"])
    nn.init.uniform_(model.cls.predictions.bias)
    assert "cls.predictions.decoder" in dict(quantized_layers(model))
    round_rest(model)
    export(model, tmp_path / "out")
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    loaded.tie_weights()
    assert loaded.cls.predictions.bias.shape == (100,)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load(tmp_path / "out", trainable=True)), logits(model))


def test_labels_tokenizer_and_pipeline_come_along(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert AutoTokenizer.from_pretrained(folder)("good film")["input_ids"] == [3, 5]
    for answer in (
        pipeline("text-classification", model=str(folder)),
        pipeline("text-classification", model=load(folder), tokenizer=AutoTokenizer.from_pretrained(folder)),
    ):
        result = answer(["the film was good", "bad film"], padding=True)
        assert {each["label"] for each in result} <= {"bad", "so-so", "good"}


def test_saving_a_loaded_model_again_keeps_bits_and_size(folder, model, tmp_path):
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "again")]
    assert sizes[0] == sizes[1]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert structure_log(again) == structure_log(model)
    assert again.config.id2label == model.config.id2label


def test_saving_again_in_several_files_works(folder, model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size=2000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "shards")), logits(model))


def test_saving_again_does_not_round_what_was_trained_since(folder, tmp_path):
    loaded = load(folder)
    loaded.classifier.bias.data += 1e-7
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").classifier.bias, loaded.classifier.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_loads_in_half_precision(folder, model, dtype):
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    assert loaded.classifier.weight.dtype == dtype
    assert loaded.bert.pooler.dense.weight_scale.dtype == torch.float16
    found = logits(loaded)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), logits(model), atol=0.05)


def test_the_backbone_alone_loads_with_its_bits(folder, model):
    backbone = AutoModel.from_pretrained(folder)
    with torch.no_grad(), use_path("reference"):
        assert torch.equal(backbone(**inputs()).pooler_output, model.bert(**inputs()).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_backbone_alone_loads_in_half_precision(folder, monkeypatch, dtype):
    monkeypatch.setattr(BertModel, "_keep_in_fp32_modules_strict", ["LayerNorm"])
    backbone = AutoModel.from_pretrained(folder, dtype=dtype)
    found = {name: tensor.dtype for name, tensor in backbone.named_parameters() if tensor.is_floating_point()}
    assert found == {name: torch.float32 if "LayerNorm" in name else dtype for name in found}
    assert backbone.pooler.dense.weight_scale.dtype == torch.float16


def test_the_backbone_alone_can_be_saved(folder, tmp_path):
    backbone = AutoModel.from_pretrained(folder)
    backbone.save_pretrained(tmp_path / "backbone")
    again = load(tmp_path / "backbone")
    assert type(again) is BertModel
    with torch.no_grad(), use_path("reference"):
        assert torch.equal(again(**inputs()).pooler_output, backbone(**inputs()).pooler_output)


def test_what_lost_layers_since_it_was_loaded_can_be_saved(folder, tmp_path):
    loaded = load(folder)
    reduce_layers(loaded, layers=[1])
    loaded.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert len(again.bert.encoder.layer) == 1
    assert structure_log(again) == structure_log(loaded)
    assert torch.equal(logits(again), logits(loaded))


def test_a_backbone_folder_opens_under_a_new_head(tmp_path, model):
    export(model.bert, tmp_path / "backbone")
    assert type(load(tmp_path / "backbone")) is BertModel
    headed = AutoModelForTokenClassification.from_pretrained(tmp_path / "backbone", num_labels=5)
    assert isinstance(headed.bert.encoder.layer[0].attention.self.query, PackedLayer)
    trained = {name for name, parameter in headed.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    with torch.no_grad(), use_path("reference"):
        ours, theirs = (part(**inputs()).last_hidden_state for part in (headed.bert, model.bert))
    assert torch.equal(ours, theirs)


def test_an_output_layer_that_was_not_exported_is_not_made_up(tmp_path):
    export(quantized(GPT2Model(tiny_config("gpt2")).eval()), tmp_path / "out")
    with pytest.raises(FiftyfoldError, match=r"lm_head\.weight.*export the model together with its output layer"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "out")


def test_loaded_weights_lie_where_sums_round_alike(folder):
    loaded = load(folder)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.parameters() if tensor.numel())
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(loaded))


def test_an_embedding_in_bits_cannot_be_resized(folder):
    with pytest.raises((TypeError, ValueError)):
        load(folder).resize_token_embeddings(200)


def test_a_state_dict_passes_from_one_loaded_model_to_another(folder, model):
    one, other = load(folder), load(folder)
    one.classifier.bias.data += 1
    assert STATE_KEY in one.state_dict()
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one), logits(other))


def test_registering_twice_is_harmless():
    register_plugin()
    importlib.reload(importlib.import_module("fiftyfold"))
    assert fiftyfold.load is load


def test_transformers_cannot_quantize_by_it_while_loading(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    from fiftyfold.modules.packed.manifest import Manifest
    from fiftyfold.modules.packed.plugin import FiftyfoldConfig

    config = FiftyfoldConfig(**Manifest().to_json())
    with pytest.raises(FiftyfoldError, match="use fiftyfold's quantize"):
        BertForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config)


# --- training goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_trainable_model_has_the_same_bits_and_learns(tmp_path, bits, kind, static):
    model = tiny_model(kind, layers=2)
    reduce_layers(model, layers=[1])
    quantized(model, weight_bits=bits, activation_range="static" if static else "dynamic")
    round_rest(model)
    export(model, tmp_path / "out")
    trainable = load(tmp_path / "out", trainable=True)
    assert torch.equal(logits(trainable), logits(model))
    assert structure_log(trainable) == structure_log(model)
    theirs = dict(quantized_layers(model))
    ours = dict(quantized_layers(trainable))
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert layer.settings == theirs[name].settings
        for found, expected in zip(codes_and_scale(layer), codes_and_scale(theirs[name]), strict=True):
            assert torch.equal(found, expected), name
    _learn(trainable)
    export(trainable, tmp_path / "later")
    assert not torch.equal(logits(load(tmp_path / "later")), logits(model))


def _learn(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**inputs()).logits.pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    model.eval()


def test_trainable_ties_stay_ties(tmp_path):
    export(quantized(tiny_causal("gpt2"), targets=""), tmp_path / "out")
    model = load(tmp_path / "out", trainable=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.lm_head, QuantizedLayer)
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_trainable_model_is_no_longer_packed_for_transformers(folder, tmp_path):
    model = load(folder, trainable=True)
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    quantize(model, weight_bits=2)
    export(model, tmp_path / "two")
    assert [operation["op"] for operation in structure_log(load(tmp_path / "two"))] == [
        "reduce_layers",
        "quantize",
        "quantize",
    ]


@pytest.mark.parametrize("change", [partial(quantize, weight_bits=2), partial(tensorize, keep=0.3)])
def test_transformers_saves_nothing_that_would_come_back_as_another_model(tmp_path, change):
    model = tiny_causal("llama")
    model.save_pretrained(tmp_path / "plain")
    change(model)
    with pytest.raises(FiftyfoldError, match=r"use fiftyfold\.export"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    export(model, tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    trained = load(tmp_path / "again", trainable=True)
    with pytest.raises(FiftyfoldError, match=r"use fiftyfold\.export"):
        trained.save_pretrained(tmp_path / "changed")


def test_making_it_trainable_draws_no_random_numbers(folder):
    load(folder, trainable=True)
    state = torch.get_rng_state()
    load(folder, trainable=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_strangers_model_trains_on_too(tmp_path):
    model = Encoder()
    quantize(model)
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out", into=Encoder(), trainable=True)
    assert {name for name, _ in quantized_layers(loaded)} == {name for name, _ in quantized_layers(model)}
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_model_of_transformers_that_is_filled_trains_on_too(tmp_path):
    model = tiny_bert()
    quantize(model)
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out", into=tiny_bert(seed=1), trainable=True)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


# --- without the plug-in --------------------------------------------------------------------------------------------

WITHOUT = """
import sys
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification, pipeline
from transformers.utils import logging
logging.set_verbosity_error()
openers = [
    AutoModelForSequenceClassification.from_pretrained,
    BertForSequenceClassification.from_pretrained,
    AutoModel.from_pretrained,
    lambda folder: pipeline("text-classification", model=folder),
]
for folder in sys.argv[1:]:
    for number, open_folder in enumerate(openers):
        try:
            open_folder(folder)
        except (RuntimeError, ValueError, OSError):
            continue
        print("SILENT", folder, number)
print("end")
assert not any(name.startswith("fiftyfold") for name in sys.modules)
"""


def test_without_the_plug_in_every_way_to_open_it_raises(tmp_path):
    folders = []
    for bits in (1, 8):
        model = quantized(BertForSequenceClassification(tiny_config("bert", layers=1)).eval(), weight_bits=bits)
        folder, again = tmp_path / f"{bits}", tmp_path / f"{bits}-again"
        export(model, folder, tokenizer=tiny_tokenizer())
        load(folder).save_pretrained(again)
        tiny_tokenizer().save_pretrained(again)
        folders += [str(folder), str(again)]
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.stdout == "end\n", done.stdout + done.stderr


def test_no_packed_weight_has_the_shape_of_a_dense_one(tmp_path):
    """An 8-bit weight of as many bytes as entries is told apart by its one dimension."""
    for bits in (1, 2, 3, 4, 8):
        model = quantized(BertForSequenceClassification(BertConfig(**_ONE)), weight_bits=bits)
        export(model, tmp_path / str(bits))
        loaded = load(tmp_path / str(bits))
        packed = [module for module in loaded.modules() if isinstance(module, PackedLayer)]
        assert packed
        assert all(module.weight.dim() == 1 for module in packed)
    assert not any(isinstance(module, nn.Linear) for name, module in loaded.bert.named_modules())


_ONE = {
    "vocab_size": 20,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 40,
}
