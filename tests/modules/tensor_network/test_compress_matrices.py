"""The activation-aware family on whole models."""

from __future__ import annotations

import copy
import functools
import json
import math
import re

import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import compress_matrices, export, load, quantize, tensorize
from fiftyfold.modules.journal import LINES_FILE, Journal
from fiftyfold.modules.structure import loading_values, replay, structure_log
from fiftyfold.modules.tensor_network import compressed_copy, sensitivity
from fiftyfold.modules.tensor_network.finished_layers import FinishedLayers
from fiftyfold.modules.tensor_network.moments import call_order, collect_moments
from fiftyfold.modules.tensor_network.solvers import SWEEPS
from tests.tiny import tiny_batch, tiny_bert, tiny_causal, tiny_model

TEXT = [tiny_batch(seed) for seed in range(4)]


def deviation(model, before):
    with torch.no_grad():
        after = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in TEXT]
    return sum(float((one - other).square().sum()) for one, other in zip(before, after, strict=True))


@pytest.fixture
def llama():
    """Its weights are large enough for the layers to matter."""
    model = tiny_causal("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def logits(model):
    with torch.no_grad():
        return [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in TEXT]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"allocation": "outputs"}, {"allocation": "uniform"}, {"compressed_prefix": False}, {"factor_bits": 8}],
    ids=str,
)
def test_it_beats_the_plain_svd_within_the_budget(llama, arguments):
    before, plain = logits(llama), copy.deepcopy(llama)
    tensorize(plain, 2, keep=0.5, split="low_rank")
    results = compress_matrices(llama, TEXT, 0.5, **arguments)
    dense = sum(2 * m.weight.numel() for n, m in tiny_causal("llama").named_modules() if n in results)
    assert sum(result.bytes for result in results.values()) <= 0.5 * dense
    assert deviation(llama, before) < deviation(plain, before)


def test_a_regression_spends_its_budget():
    model = tiny_bert(labels=1)
    results = compress_matrices(model, TEXT, 0.5, families=("svd",))
    dense = sum(2 * m.weight.numel() for n, m in tiny_bert(labels=1).named_modules() if n in results)
    assert 0.4 * dense < sum(result.bytes for result in results.values()) <= 0.5 * dense


def test_outputs_that_no_matrix_moves_are_refused(llama):
    nn.init.zeros_(llama.lm_head.weight)
    with pytest.raises(FiftyfoldError, match="allocation='outputs'"):
        compress_matrices(llama, TEXT, 0.5, families=("svd",))
    compress_matrices(llama, TEXT, 0.5, families=("svd",), allocation="outputs")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_folder_gives_it_back(family, bits, tmp_path):
    model = tiny_model(family)
    results = compress_matrices(model, TEXT, 0.4, allocation="uniform", factor_bits=bits, sweeps=1)
    report = export(model, tmp_path / "out")
    assert report.outputs_equal is True
    assert report.part_bytes["packed_weights"] + report.part_bytes["scales"] == sum(r.bytes for r in results.values())
    loaded, again = load(tmp_path / "out"), load(tmp_path / "out", trainable=True)
    torch.testing.assert_close(again(**TEXT[0]).logits, loaded(**TEXT[0]).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded(**TEXT[0]).logits, model(**TEXT[0]).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.6])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_matrices_may_stay_whole_in_few_bits(family, keep, tmp_path):
    model = tiny_model(family)
    dense = {name: 2 * module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}
    results = compress_matrices(model, TEXT, keep, factor_bits=8, whole_bits=(3, 4, 8), sweeps=1)
    whole = {name: result.whole_bits for name, result in results.items() if result.form is None}
    assert whole
    quantized = {
        name: entry["settings"][index]["weight"]["bits"]
        for entry in structure_log(model)
        if entry["op"] == "quantize"
        for name, index in entry["targets"].items()
    }
    assert quantized == {name: result.whole_bits or 8 for name, result in results.items()}
    assert sum(result.bytes for result in results.values()) <= keep * sum(dense[name] for name in results)
    report = export(model, tmp_path / "out")
    assert report.outputs_equal is True
    assert report.part_bytes["packed_weights"] + report.part_bytes["scales"] == sum(r.bytes for r in results.values())
    again = load(tmp_path / "out", trainable=True)
    torch.testing.assert_close(again(**TEXT[0]).logits, model(**TEXT[0]).logits, atol=1e-3, rtol=1e-3)


def test_a_whole_matrix_is_nearer_than_a_network_and_than_plain_rounding(llama):
    before, networks, plain = logits(llama), copy.deepcopy(llama), copy.deepcopy(llama)
    compress_matrices(networks, TEXT, 0.4, factor_bits=8)
    results = compress_matrices(llama, TEXT, 0.4, factor_bits=8, whole_bits=(4,), allocation="uniform")
    assert {result.whole_bits for result in results.values()} == {4}
    quantize(plain, weight_bits=4, activation_bits=None, granularity="per_channel", targets=list(results))
    assert deviation(llama, before) < deviation(plain, before)
    assert deviation(llama, before) < deviation(networks, before)


def test_a_network_does_not_become_whole(llama):
    tensorize(llama, 2, keep=0.9, split="low_rank", targets=["q_proj"])
    results = compress_matrices(llama, TEXT, 0.4, factor_bits=8, whole_bits=(4,), allocation="uniform")
    assert {name for name, result in results.items() if result.form is not None} == {
        n for n in results if "q_proj" in n
    }


def test_an_optimizer_trains_what_stayed_whole(llama):
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    results = compress_matrices(llama, TEXT, 0.4, factor_bits=8, whole_bits=(4,), optimizer=optimizer)
    name = next(name for name, result in results.items() if result.whole_bits)
    before = llama.get_submodule(name).weight.clone()
    llama(input_ids=TEXT[0]["input_ids"]).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(llama.get_submodule(name).weight, before)


FEW_BITS = {"factor_bits": 8, "whole_bits": (4, 8)}


@pytest.mark.parametrize("arguments", [{}, FEW_BITS], ids=["network", "whole"])
@pytest.mark.parametrize("size", [24, 600])
def test_a_layers_bias_takes_up_the_mean(size, arguments):
    model = nn.Sequential(nn.Linear(size, size))
    inputs = [torch.randn(200, size) + 5]
    expected = model(inputs[0]).mean(0)
    (result,) = compress_matrices(model, inputs, 0.6, allocation="uniform", sweeps=1, **arguments).values()
    assert (result.whole_bits is not None) == bool(arguments)
    assert result.error > 1e-5
    torch.testing.assert_close(model(inputs[0]).mean(0), expected, atol=1e-4, rtol=1e-4)


def test_later_layers_make_up_for_earlier_ones(llama):
    before, blind = logits(llama), copy.deepcopy(llama)
    compress_matrices(llama, TEXT, 0.3, allocation="uniform", families=("svd",))
    compress_matrices(blind, TEXT, 0.3, allocation="uniform", families=("svd",), compressed_prefix=False)
    assert deviation(llama, before) < deviation(blind, before)


def test_layers_that_read_one_tensor_make_one_stage():
    names = ["model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert call_order(tiny_causal("llama"), names, TEXT[0]) == [names[1::-1], names[2:]]


def test_padding_does_not_count():
    model, name = tiny_model("bert"), "bert.encoder.layer.0.attention.self.query"
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    one, other = (collect_moments(model, [name], [each])[name] for each in (batch, padded))
    torch.testing.assert_close(one.inputs, other.inputs, atol=1e-6, rtol=1e-5)


def test_the_log_holds_the_results():
    model = tiny_model("bert")
    compress_matrices(model, TEXT, 0.4)
    (entry,) = structure_log(model)
    assert entry["op"] == "compress_matrices"
    assert set(entry["targets"]) <= set(entry["errors"])
    fresh = tiny_model("bert", seed=1)
    with loading_values():
        replay(fresh, structure_log(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(**TEXT[0]).logits, model(**TEXT[0]).logits)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ([], {}, "calibration text is empty"),
        ([{"input_ids": torch.zeros(0, 5, dtype=torch.long)}], {}, "calibration text is empty"),
        ([{"input_ids": torch.tensor([[5000]])}], {}, "another vocabulary"),
        (TEXT, {"keep": 0.001}, "cannot be met|fits into"),
        (TEXT, {"keep": 1.5}, "keep must be a share"),
        (TEXT, {"families": ("tucker",)}, "families"),
        (TEXT, {"factor_bits": 4}, "factor_bits"),
        (TEXT, {"whole_bits": (5,)}, "whole_bits"),
        (TEXT, {"sweeps": -1}, "sweeps"),
        (TEXT, {"families": None}, "families must be some of"),
        (3, {}, "a list of batches, not one int"),
        (TEXT[0]["input_ids"], {}, "a list of batches, not one Tensor"),
        (TEXT, {"whole_bits": 4}, "whole_bits must be a sequence"),
        (TEXT, {"optimizer": 3}, "is no optimizer"),
        ([{"foo": torch.zeros(1, 2)}], {}, "cannot be called with the calibration batches"),
        (TEXT, {"targets": None}, "targets must be a pattern"),
        ("a sentence", {}, "not str; tokenize"),
        (TEXT, {"targets": "embeddings"}, "is an embedding"),
    ],
)
def test_bad_input_leaves_the_model_alone(text, arguments, message):
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FiftyfoldError, match=message):
        compress_matrices(model, text, **arguments)
    assert not structure_log(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_no_numbers_are_refused():
    model = tiny_model("bert")
    model.bert.encoder.layer[2].output.dense.weight.data[0, 0] = math.nan
    with pytest.raises(FiftyfoldError, match=r"layer\.2\.output.*not finite"):
        compress_matrices(model, TEXT)


def test_a_budget_that_cannot_be_met_is_told_with_the_least_that_can():
    model = tiny_model("bert")
    with pytest.raises(FiftyfoldError, match="cannot be met") as refused:
        compress_matrices(model, TEXT, 0.001)
    budget, least = map(int, re.findall(r"\d+", str(refused.value)))
    keep = 0.001 * least / budget
    with pytest.raises(FiftyfoldError, match=f"smallest forms take {least};"):
        compress_matrices(model, TEXT, 0.9 * keep)
    assert compress_matrices(model, TEXT, 1.1 * keep)


@pytest.mark.parametrize("function", ["svd", "eigh"])
def test_out_of_memory_is_told_in_a_sentence(function, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    model = tiny_model("bert")
    monkeypatch.setattr(torch.linalg, function, fail)
    with pytest.raises(FiftyfoldError, match="memory does not suffice"):
        compress_matrices(model, TEXT, 0.5)
    assert not structure_log(model)


def test_each_matrix_is_reported():
    model, told = tiny_model("bert"), []
    results = compress_matrices(model, TEXT, 0.5, report=lambda *words: told.append(words))
    count = len(results)
    orders = [words for words in told if words[0] == "ordered"]
    assert orders == [("ordered", done, len(orders)) for done in range(1, len(orders) + 1)]
    others = [words for words in told if words[0] != "ordered"]
    kinds = ("measured", "weighed", "compressed")
    assert others == [(what, done, count) for what in kinds for done in range(1, count + 1)]


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("llama", {}),
        ("bert", {"compressed_prefix": False}),
        ("gpt2", {"families": ("mpo2",)}),
        ("llama", {"factor_bits": 8, "whole_bits": (3, 4, 8)}),
        ("shared", {"targets": ["query", "key", "intermediate"]}),
    ],
    ids=str,
)
def test_it_goes_on_after_each_thing_that_it_found(kind, arguments, every, tmp_path, monkeypatch):
    make, keep = shared_layers if kind == "shared" else functools.partial(tiny_model, kind), 0.4
    whole = make()
    expected = compress_matrices(whole, TEXT, keep, **arguments)
    add, left = Journal.add, every

    def cut(self, *found):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        add(self, *found)

    monkeypatch.setattr(Journal, "add", cut)
    found, cuts = None, 0
    while found is None:
        left, model = every, make()
        try:
            found = compress_matrices(model, TEXT, keep, work_folder=tmp_path, **arguments)
        except KeyboardInterrupt:
            cuts += 1
    assert found == expected
    assert cuts >= len(found) // every
    assert_equal(model, whole)
    left, again = 0, make()
    compress_matrices(again, TEXT, keep, work_folder=str(tmp_path), **arguments)
    assert_equal(again, whole)


def shared_layers():
    """A model some of whose layers are called in two blocks."""
    model = tiny_bert(layers=4, hidden=16, vocab=100)
    first, second, third, fourth = model.bert.encoder.layer
    third.intermediate.dense = first.intermediate.dense
    fourth.attention.self = second.attention.self
    return model


def test_layers_in_two_blocks_are_compressed_as_without_a_memory_of_outputs(monkeypatch):
    """What is remembered of a block's output may not be from before one of its layers changed."""
    quick, plain, arguments = shared_layers(), shared_layers(), {"families": ("svd",)}
    found = compress_matrices(quick, TEXT, 0.5, **arguments)
    for module in (compressed_copy, sensitivity):
        monkeypatch.setattr(module, "finished_layers", lambda *_: FinishedLayers())
    expected = compress_matrices(plain, TEXT, 0.5, **arguments)
    for name, result in found.items():
        assert result.error == pytest.approx(expected[name].error, rel=1e-3), name


def test_logits_that_rule_a_token_out_are_weighed(llama):
    """Minus infinity on both sides is no difference."""
    llama.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(2, torch.tensor([3, 4]), -math.inf))
    assert compress_matrices(llama, TEXT, 0.5, families=("svd",))


def test_outputs_that_are_not_finite_are_told_of(llama, monkeypatch):
    some = sensitivity.some_outputs
    monkeypatch.setattr(
        sensitivity, "some_outputs", lambda *found: sensitivity.Outputs(some(*found).values * math.inf, True)
    )
    with pytest.raises(FiftyfoldError, match=r"not finite where 'model\.layers\.0"):
        compress_matrices(llama, TEXT, 0.5, families=("svd",))


def assert_equal(model, other):
    values = other.state_dict()
    for name, value in model.state_dict().items():
        assert value == values[name] if not isinstance(value, torch.Tensor) else torch.equal(value, values[name]), name


@pytest.mark.parametrize("what", ["keep", "text", "weights", "plan", "configuration"])
def test_the_work_folder_of_another_compression_is_refused_and_stays(what, tmp_path):
    compress_matrices(tiny_model("bert"), TEXT, 0.5, allocation="uniform", work_folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tiny_model("bert")
    if what == "weights":
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] += 1
    if what == "configuration":
        model.config.layer_norm_eps = 0.1
    text = TEXT[::-1] if what == "text" else TEXT
    arguments = {"keep": 0.4 if what == "keep" else 0.5, "sweeps": 3 if what == "plan" else SWEEPS}
    with pytest.raises(FiftyfoldError, match="another model or text, or with other options"):
        compress_matrices(model, text, allocation="uniform", work_folder=tmp_path, **arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not structure_log(model)


def _swap(line, key, other):
    line["value"][key] = other


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("matrix", lambda line: _swap(line, "error", "small")),
        ("matrix", lambda line: _swap(line, "form", {})),
        ("matrix", lambda line: _swap(line, "whole_bits", 5)),
        ("matrix", lambda line: line["value"]["form"].update(shape=[1, 1])),
        ("matrix", lambda line: line.update(value=None)),
        ("matrix", lambda line: line.update(file="../../absent.safetensors")),
        ("matrix", lambda line: line.pop("digest")),
        ("bytes", lambda line: line["value"].popitem()),
        ("order", lambda line: line["value"]["rows"].update(absent=[0])),
        ("order", lambda line: line["value"]["columns"].update({"bert.encoder.layer.0.output.dense": [0, 0]})),
        ("order", lambda line: line.update(value=[])),
    ],
)
def test_an_altered_work_folder_is_refused(key, change, tmp_path):
    compress_matrices(tiny_model("bert"), TEXT, 0.4, allocation="uniform", work_folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / LINES_FILE).read_text().splitlines()]
    change(next(line for line in lines if line.get("key", "").startswith(key)))
    (tmp_path / LINES_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FiftyfoldError, match=r"is damaged \(at .*delete .* to begin anew"):
        compress_matrices(tiny_model("bert"), TEXT, 0.4, allocation="uniform", work_folder=tmp_path)


def test_a_layer_that_is_called_twice_serves_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(24, 24, bias=False)

        def forward(self, x):
            return self.inner(self.inner(x).roll(12, dims=-1))

    model, x = Twice(), torch.randn(400, 24)
    x[:, 12:] *= 0.01
    second = model.inner(x).roll(12, dims=-1).detach()
    original = model.inner.weight.detach().clone()
    found = compress_matrices(model, [x], 0.6, targets=["inner"], families=("svd",), allocation="uniform")
    difference = model.inner.dense_weight().detach() - original
    both = torch.cat([x, second])
    expected = float((both @ difference.T).norm() / (both @ original.T).norm())
    assert found["inner"].error == pytest.approx(expected, rel=1e-3)
    assert expected > 0.1, "the first call alone leaves half of the inputs free"
