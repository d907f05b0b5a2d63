"""What export writes, and what it refuses."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fiftyfold
from fiftyfold import folder_replacement
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import packed_bytes
from fiftyfold.modules import export, load, quantize, reduce_layers
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.packed.weights_file import read_headers
from fiftyfold.modules.quantization.quantize import XTC_SETTINGS, install_quantizers
from fiftyfold.modules.structure import structure_log
from tests.modules.packed.examples import Encoder, inputs, logits, quantized, tiny_tokenizer
from tests.tiny import FAMILIES, tiny_bert, tiny_causal, tiny_model

export_module = sys.modules["fiftyfold.modules.packed.export"]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_holds_bits_scales_and_a_narrow_rest(tmp_path):
    model = quantized(tiny_bert())
    report = export(model, tmp_path / "out")
    headers = read_headers([tmp_path / "out" / "model.safetensors"])
    query = headers["bert.encoder.layer.0.attention.self.query.weight"]
    assert (query.dtype, query.shape) == ("U8", (32 * 32 // 8,))
    assert headers["bert.embeddings.word_embeddings.weight_scale"].shape == (100, 1)
    assert {header.dtype for name, header in headers.items() if name.endswith("weight_scale")} == {"F16"}
    assert headers["classifier.weight"].dtype == "F16"
    assert not any("structure" in name or "position_ids" in name for name in headers)
    assert files(tmp_path) == ["out"]
    assert files(tmp_path / "out") == ["config.json", "fiftyfold_report.json", "model.safetensors"]
    assert report.outputs_equal is True


def test_equal_models_give_equal_files(tmp_path):
    model = quantized(tiny_bert())
    written = set()
    for number in range(8):
        export(model, tmp_path / str(number))
        written.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_whoever_may_read_one_file_may_read_all(tmp_path):
    export(quantized(tiny_bert()), tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_the_report_says_what_is_on_the_disk(tmp_path):
    model = quantized(tiny_bert(), weight_bits=2)
    report = export(model, tmp_path / "out", report={"score": 0.5})
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.file_bytes == size == sum(report.part_bytes.values())
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.ratio == pytest.approx(4 * report.parameters / size)
    assert report.ideal_ratio == 16
    layers = [module for module in model.modules() if getattr(module, "settings", None)]
    assert report.packed_parameters == sum(layer.weight.numel() for layer in layers)
    assert report.part_bytes["packed_weights"] == sum(packed_bytes(layer.weight.numel(), 2) for layer in layers)
    assert report.beyond_xtc == [
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        "bert.pooler.dense",
    ]
    written = json.loads((tmp_path / "out" / "fiftyfold_report.json").read_text())
    assert written["run"] == {"score": 0.5}
    assert written["file_bytes"] == size
    assert str(tmp_path) not in json.dumps(written)
    others = [path for path in (tmp_path / "out").iterdir() if path.name != "fiftyfold_report.json"]
    assert report.folder_bytes == sum(path.stat().st_size for path in others)


def test_xtc_targets_pack_nothing_beyond_xtc(tmp_path):
    report = export(quantized(tiny_bert(), weight_bits=1, **XTC_SETTINGS), tmp_path / "out")
    assert report.beyond_xtc == []


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("arguments", [{}, {"weight_bits": 2, "granularity": "per_channel"}], ids=["1 bit", "2 bit"])
def test_every_family_comes_back_bit_for_bit(tmp_path, kind, arguments):
    model = quantized(tiny_model(kind), **arguments)
    report = export(model, tmp_path / "out")
    round_rest(model)
    assert report.outputs_equal is True
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_bits": None},
        {"granularity": "per_channel", "symmetric": False},
        {"granularity": "per_group", "group_size": 16, "full_range": True},
        {"activation_range": "static", "clip": 2.5},
    ],
    ids=["weights alone", "asymmetric", "groups", "static"],
)
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_every_setting_comes_back_bit_for_bit(tmp_path, kind, bits, arguments):
    model = quantized(tiny_model(kind, layers=2), weight_bits=bits, **arguments)
    round_rest(model)
    export(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_export_changes_nothing_in_the_model(tmp_path):
    model = quantized(tiny_bert()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    export(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.training


def test_rounding_the_rest_is_all_that_is_lost_and_its_effect_is_stated(tmp_path):
    model = quantized(tiny_bert())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    report = export(model, tmp_path / "half")
    assert 0 < report.rounding_difference < 1e-2
    assert report.rounding_difference == pytest.approx(export(model, tmp_path / "again").rounding_difference)
    full = export(model, tmp_path / "full", rest_dtype="float32")
    assert full.rounding_difference == 0
    assert torch.equal(logits(load(tmp_path / "full")), logits(model))
    round_rest(model)
    assert export(model, tmp_path / "rounded").rounding_difference == 0


def test_values_beyond_float16_stay_float32(tmp_path):
    model = quantized(tiny_bert())
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    export(model, tmp_path / "out")
    headers = read_headers([tmp_path / "out" / "model.safetensors"])
    assert headers["classifier.bias"].dtype == "F32"
    assert load(tmp_path / "out").classifier.bias[0] == 1e6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_an_output_layer_tied_to_the_embedding_is_packed_once(tmp_path, kind, tie):
    model = tiny_causal(kind)
    model.config.tie_word_embeddings = tie
    model = type(model)(model.config).eval()
    quantized(model, targets="")
    report = export(model, tmp_path / "out")
    round_rest(model)
    headers = read_headers([tmp_path / "out" / "model.safetensors"])
    assert ("lm_head.weight" in headers) is not tie
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    loaded = load(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tie
    assert torch.equal(logits(loaded), logits(model))


def test_an_output_layer_that_stays_dense_keeps_a_weight_of_its_own(tmp_path):
    model = quantized(tiny_causal("gpt2"), exclude="lm_head")
    report = export(model, tmp_path / "out")
    assert report.outputs_equal is True
    headers = read_headers([tmp_path / "out" / "model.safetensors"])
    assert headers["lm_head.weight"].shape == (100, 32)
    loaded = load(tmp_path / "out")
    assert isinstance(loaded.lm_head, nn.Linear)
    assert loaded.get_input_embeddings().weight.dtype == torch.uint8


def test_layers_are_reduced_in_the_folder_too(tmp_path):
    model = tiny_bert(layers=5)
    reduce_layers(model, layers=[1, 3])
    quantized(model)
    round_rest(model)
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert len(loaded.bert.encoder.layer) == 2
    assert structure_log(loaded) == structure_log(model)
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_with_nothing_quantized_is_narrowed_alone(tmp_path):
    model = tiny_bert()
    reduce_layers(model, layers=[0, 2])
    install_quantizers(model)
    report = export(model, tmp_path / "out")
    assert (report.packed_parameters, report.ideal_ratio) == (0, None)
    round_rest(model)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_packed_model_can_be_exported_again(tmp_path):
    first = export(quantized(tiny_causal("gpt2"), targets=""), tmp_path / "one")
    second = export(load(tmp_path / "one"), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) and two[name].dtype == tensor.dtype for name, tensor in one.items())
    assert second.file_bytes == first.file_bytes
    assert structure_log(load(tmp_path / "two")) == structure_log(load(tmp_path / "one"))


def test_a_model_in_bfloat16_keeps_its_type(tmp_path):
    model = quantized(tiny_bert().to(torch.bfloat16))
    report = export(model, tmp_path / "out")
    assert report.outputs_equal is True
    loaded = load(tmp_path / "out")
    assert loaded.classifier.weight.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_a_compiled_model_is_exported_as_what_it_is(tmp_path):
    model = quantized(tiny_bert())
    expected = logits(model)
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    export(torch.compile(model, backend="eager"), tmp_path / "out", rest_dtype="float32")
    assert torch.equal(logits(load(tmp_path / "out")), expected)


def test_of_a_module_around_it_the_compressed_model_is_exported(tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = quantized(tiny_bert())
            self.other = nn.Linear(3, 3)

    around = Around()
    export(around, tmp_path / "out", rest_dtype="float32")
    assert torch.equal(logits(load(tmp_path / "out")), logits(around.student))


def test_a_strangers_model_comes_back_into_a_fresh_one(tmp_path):
    model = Encoder()
    reduce_layers(model, layers=[1, 3])
    quantize(model, granularity="per_channel")
    model.calls += 7
    tokens = torch.arange(12).view(2, 6)
    report = export(model, tmp_path / "out", example=tokens)
    assert report.outputs_equal is True
    assert files(tmp_path / "out") == ["fiftyfold_report.json", "model.safetensors", "structure.json"]
    round_rest(model)
    fresh = Encoder()
    loaded = load(tmp_path / "out", into=fresh)
    assert loaded is fresh
    assert len(fresh.blocks) == 2
    assert fresh.calls == 7
    with torch.no_grad(), fiftyfold.kernels.path.use_path("reference"):
        assert torch.equal(loaded(tokens), model.eval()(tokens))


@pytest.mark.parametrize("example", [None, [torch.arange(6).view(1, 6)], {"tokens": torch.arange(6).view(1, 6)}])
def test_an_example_may_be_given_in_any_form(tmp_path, example):
    model = Encoder()
    quantize(model)
    report = export(model, tmp_path / "out", example=example)
    assert report.outputs_equal is (None if example is None else True)


def test_a_lightning_module_is_a_strangers_model(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, x):
            return self.net(x)

    model = Lit()
    quantize(model)
    x = torch.randn(3, 8)
    export(model, tmp_path / "out", example=x, rest_dtype="float32")
    fresh = load(tmp_path / "out", into=Lit())
    with fiftyfold.kernels.path.use_path("reference"):
        assert torch.equal(fresh(x), model(x))


def test_torchs_encoder_layers_do_not_read_packed_bytes_as_a_weight(tmp_path):
    def build():
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    model = build()
    quantize(model)
    x = torch.randn(2, 5, 16)
    assert export(model, tmp_path / "out", example=x).outputs_equal is True
    load(tmp_path / "out", into=build())


def test_a_tokenizer_goes_along(tmp_path):
    export(quantized(tiny_bert()), tmp_path / "out", tokenizer=tiny_tokenizer())
    assert "tokenizer.json" in files(tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FiftyfoldError, match="already holds something"):
            export(quantized(tiny_bert()), tmp_path / "out", overwrite=overwrite)
    assert files(tmp_path) == ["out"]
    assert files(tmp_path / "out") == ["thesis.txt"]


def test_an_exported_folder_is_replaced_only_when_asked(tmp_path):
    export(quantized(tiny_bert()), tmp_path / "out")
    model = quantized(tiny_bert(seed=1))
    with pytest.raises(FiftyfoldError, match="choose another folder"):
        export(model, tmp_path / "out")
    export(model, tmp_path / "out", overwrite=True, rest_dtype="float32")
    assert files(tmp_path) == ["out"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_failed_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    model = quantized(tiny_bert())
    export(model, tmp_path / "out", rest_dtype="float32")
    original = type(tmp_path).rename

    def rename(self, target):
        if "." in self.name and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises(FiftyfoldError, match="Input/output error"):
        export(quantized(tiny_bert(seed=1)), tmp_path / "out", overwrite=True)
    assert files(tmp_path) == ["out"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_an_empty_folder_and_missing_parents_will_do(tmp_path):
    (tmp_path / "empty").mkdir()
    export(quantized(tiny_bert()), tmp_path / "empty")
    export(quantized(tiny_bert()), str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c" / "model.safetensors").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(FiftyfoldError, match="is a file"):
        export(quantized(tiny_bert()), tmp_path / "out")
    with pytest.raises(FiftyfoldError, match="cannot be written"):
        export(quantized(tiny_bert()), tmp_path / "out" / "deeper")


def test_a_read_only_place_is_said_to_be_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    with pytest.raises(FiftyfoldError, match=r"cannot be written .*Permission denied"):
        export(quantized(tiny_bert()), tmp_path / "out")


def test_a_kill_in_the_moment_of_replacing_is_named_by_load_and_completed_by_the_next_export(tmp_path):
    first, second = quantized(tiny_bert()), quantized(tiny_bert(seed=1))
    export(first, tmp_path / "out", rest_dtype="float32")
    export(second, tmp_path / ".out.5e1f", rest_dtype="float32")
    (tmp_path / "out").rename(tmp_path / ".out.5e1f.old")
    with pytest.raises(
        FiftyfoldError, match=r"new model is whole in .*\.out\.5e1f, the one before it in .*\.old; rename"
    ):
        load(tmp_path / "out")
    with pytest.raises(FiftyfoldError, match="already holds something"):
        export(quantized(tiny_bert(seed=2)), tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(second))
    assert files(tmp_path) == ["out"]


@pytest.mark.parametrize("victim", ["write_tensors", "_write_json", "sync"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, victim):
    def fill(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_replacement if victim == "sync" else export_module, victim, fill)
    with pytest.raises(FiftyfoldError, match=r"cannot be written .*No space left on device.*nothing was exported"):
        export(quantized(tiny_bert()), tmp_path / "out")
    assert files(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, quantize
from tests.modules.packed.examples import tiny_tokenizer
from tests.tiny import tiny_bert

model = tiny_bert()
quantize(model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (300, 12_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(model, sys.argv[1], tokenizer=tiny_tokenizer())
    except FiftyfoldError as error:
        assert "cannot be written" in str(error), error
        print("refused")
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_disk_that_really_refuses_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["refused", "refused"], done.stderr
    assert files(tmp_path) == []


def test_a_tokenizer_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()

    def fail(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(FiftyfoldError, match="No space left"):
        export(quantized(tiny_bert()), tmp_path / "out", tokenizer=tokenizer)
    assert files(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(quantized(tiny_bert()), tmp_path / "out")
    assert files(tmp_path) == []


def test_what_reads_back_differently_is_not_exported(tmp_path, monkeypatch):
    def spoilt(*arguments, **more):
        model = load(*arguments, **more)
        model.classifier.bias.data += 1
        return model

    monkeypatch.setattr(export_module, "load", spoilt)
    with pytest.raises(FiftyfoldError, match=r"'classifier\.bias' reads back differently"):
        export(quantized(tiny_bert()), tmp_path / "out")
    assert files(tmp_path) == []


def test_outputs_that_differ_are_not_exported(tmp_path, monkeypatch):
    real = export_module.compute
    calls = []

    def compute(model, example):
        calls.append(model)
        return [output + (len(calls) == 3) for output in real(model, example)]

    monkeypatch.setattr(export_module, "compute", compute)
    with pytest.raises(FiftyfoldError, match="outputs differ by 1"):
        export(quantized(tiny_bert()), tmp_path / "out")
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["classifier.bias", "bert.pooler.dense.weight"])
def test_a_diverged_model_is_refused(tmp_path, name):
    model = quantized(tiny_bert())
    model.get_parameter(name).data.view(-1)[0] = torch.nan
    with pytest.raises(FiftyfoldError, match=rf"{name}.*diverged"):
        export(model, tmp_path / "out")


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    quantize(model)
    with pytest.raises(FiftyfoldError, match=r"1\._extra_state.*is no tensor but dict"):
        export(model, tmp_path / "out")


def test_a_layer_alone_is_refused(tmp_path):
    layer = nn.Linear(4, 4)
    quantize(layer)
    with pytest.raises(FiftyfoldError, match="put it into a module"):
        export(layer, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rest_dtype": "int4"}, "rest_dtype must be one of float16, float32"),
        ({"tokenizer": "bert-base-uncased"}, "transformers tokenizer, not str"),
        ({"report": {"a": object()}}, "report cannot be written"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(FiftyfoldError, match=message):
        export(quantized(tiny_bert()), tmp_path / "out", **arguments)
    assert files(tmp_path) == []


def test_the_integer_path_stays_close_on_a_whole_model(tmp_path):
    model = quantized(tiny_bert(layers=2))
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        fast = loaded(**inputs()).logits
    assert torch.allclose(fast, logits(loaded), atol=0.02)
