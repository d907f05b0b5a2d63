import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.quantization.layers import (
    QuantizedLayer,
    codes_and_scale,
    effective_weight,
    quantized_layers,
    remove_quantization,
)
from fiftyfold.modules.quantization.quantize import XTC_SETTINGS, install_quantizers, quantize, quantize_operation
from fiftyfold.modules.quantization.quantizers import fake_quantize_activation, fake_quantize_weight
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings
from fiftyfold.modules.structure import attach_structure, replay, structure_log
from tests.tiny import FAMILIES, tiny_batch, tiny_bert, tiny_causal, tiny_model


def logits(model):
    batch = tiny_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_dormant_layers_change_nothing(kind, static):
    model = tiny_model(kind)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    before = logits(model)
    names = install_quantizers(model, activation_range="static" if static else "dynamic")
    assert names == install_quantizers(model)
    assert torch.equal(logits(model), before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert structure_log(model) == []
    assert not list(quantized_layers(model))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_quantized_model_trains_reloads_copies_and_comes_back(kind):
    model = tiny_model(kind)
    before = logits(model)
    names = quantize(model, weight_bits=2)
    assert [name for name, _ in quantized_layers(model)] == names
    batch = tiny_batch()
    model(**batch).loss.backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in names)
    quantized = logits(model)
    assert not torch.allclose(quantized, before)

    fresh = tiny_model(kind, seed=1)
    attach_structure(fresh)
    fresh.load_state_dict(model.state_dict())
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), quantized)
        assert structure_log(other) == structure_log(model)
    remove_quantization(model)
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


@pytest.mark.parametrize("full_range", [False, True])
def test_a_linear_layer_computes_with_what_the_quantizers_give(full_range):
    layer = nn.Linear(6, 4)
    x = torch.randn(3, 5, 6)
    quantize(layer_model := nn.Sequential(layer), full_range=full_range)
    weight = fake_quantize_weight(layer.weight, WeightSettings(1))
    expected = F.linear(fake_quantize_activation(x, ActivationSettings(full_range=full_range)), weight, layer.bias)
    with use_path("reference"):
        assert torch.equal(layer_model(x), expected)
    assert torch.allclose(layer_model(x), expected, atol=1e-5)
    assert torch.equal(effective_weight(layer), weight)


def test_conv1d_has_a_scale_for_each_column():
    layer = Conv1D(4, 6)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 6)
    quantize(nn.Sequential(layer), granularity="per_channel", activation_bits=None)
    scales = layer.weight.detach().abs().mean(0)
    expected = x @ (torch.where(layer.weight >= 0, 1.0, -1.0) * scales.half().float()) + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=2e-3, atol=2e-3)
    codes, scale = codes_and_scale(layer)
    assert codes.shape == (4, 6)
    assert scale.shape == (4, 1)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).unsqueeze(1).expand(6, 4))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_an_embedding_is_quantized_by_row_whether_looked_up_or_whole(tokens):
    embedding = nn.Embedding(10, 16, padding_idx=0)
    dense = copy.deepcopy(embedding)
    quantize(nn.Sequential(embedding), weight_bits=2)
    found = torch.arange(tokens).view(1, -1) % 10
    table = fake_quantize_weight(dense.weight, WeightSettings(2, "per_channel"))
    result = embedding(found)
    assert torch.equal(result, table[found])
    upstream = torch.randn_like(result)
    result.backward(upstream)
    dense(found).backward(upstream)
    assert torch.equal(embedding.weight.grad, dense.weight.grad)


def test_a_tied_head_reads_what_the_embedding_reads():
    model = tiny_causal("gpt2")
    quantize(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.settings == embedding.settings
    assert torch.equal(effective_weight(head), effective_weight(embedding))
    assert head(torch.eye(32)).t().allclose(embedding(torch.arange(100)))


def test_xtc_is_one_dictionary_of_arguments():
    model = tiny_bert()
    names = quantize(model, weight_bits=1, **XTC_SETTINGS)
    assert len(names) == 25
    layer = model.bert.encoder.layer[0].intermediate.dense
    assert layer.settings.weight == WeightSettings(1, "per_tensor")
    assert layer.settings.activation == ActivationSettings(8, True, "dynamic", True)
    assert model.bert.embeddings.word_embeddings.settings.activation is None
    assert type(model.bert.pooler.dense) is nn.Linear


def test_the_log_holds_names_and_settings_and_replays():
    model = tiny_bert(layers=1)
    quantize(model, weight_bits=4, targets=["query", "word_embeddings"], step=7)
    (operation,) = structure_log(model)
    assert operation["op"] == "quantize"
    assert operation["step"] == 7
    assert operation["targets"] == {
        "bert.embeddings.word_embeddings": 1,
        "bert.encoder.layer.0.attention.self.query": 0,
    }
    assert operation["settings"][0]["weight"]["bits"] == 4
    other = tiny_bert(layers=1)
    replay(other, structure_log(model))
    assert torch.equal(logits(other), logits(model))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2))
    quantize(empty, activation_range="static")
    assert empty[0].activation_low.is_meta


def test_bits_step_down():
    model = tiny_bert(layers=2)
    for bits in (8, 4, 2, 1):
        names = quantize(model, weight_bits=bits)
        assert {layer.settings.weight.bits for _, layer in quantized_layers(model)} == {bits}
    assert len(structure_log(model)) == 4
    fresh = tiny_bert(layers=2, seed=3)
    attach_structure(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert len(names) == len(list(quantized_layers(fresh)))


def test_a_static_range_is_observed_in_training_only():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    install_quantizers(model, activation_range="static")
    model(torch.full((1, 2), 9.0))
    assert layer.activation_high == 0
    quantize(model, activation_range="static")
    model.eval()
    unobserved = model(torch.tensor([[1.0, -2.0]]))
    assert unobserved.abs().sum() > 0
    assert layer.activation_high == 0
    model.train()
    model(torch.tensor([[1.0, -2.0]]))
    assert (float(layer.activation_low), float(layer.activation_high)) == (-2.0, 1.0)
    model(torch.tensor([[3.0, -4.0]]))
    assert float(layer.activation_low) == pytest.approx(-2 * 0.95 - 4 * 0.05)
    assert float(layer.activation_high) == pytest.approx(1 * 0.95 + 3 * 0.05)
    observed = layer.activation_high.clone()
    model.eval()
    assert torch.equal(model(torch.tensor([[90.0, 2.1]])), model(torch.tensor([[5.0, 2.1]])))
    assert torch.equal(layer.activation_high, observed)
    quantize(model, weight_bits=2, activation_range="static")
    assert torch.equal(layer.activation_high, observed)
    quantize(model, activation_range="dynamic")
    assert "0.activation_high" not in model.state_dict()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_batch_that_overflows_does_not_spoil_a_static_range(bad):
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    quantize(model, activation_range="static")
    for _ in range(2):
        model(torch.tensor([[bad, 2.0]]))
        model(torch.tensor([[1.0, -2.0]]))
    assert (float(layer.activation_low), float(layer.activation_high)) == (-2.0, 1.0)
    assert model(torch.tensor([[1.0, -2.0]])).isfinite().all()


def test_ranges_are_saved_and_a_dense_file_loads_while_dormant():
    model = nn.Sequential(nn.Linear(2, 2))
    dense = copy.deepcopy(model).state_dict()
    install_quantizers(model, activation_range="static")
    model.load_state_dict(dense)
    quantize(model, activation_range="static")
    model(torch.randn(3, 2))
    fresh = nn.Sequential(nn.Linear(2, 2))
    attach_structure(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh[0].activation_low, model[0].activation_low)
    without = {name: value for name, value in model.state_dict().items() if "activation" not in name}
    with pytest.raises(RuntimeError, match="activation_low"):
        fresh.load_state_dict(without)


def test_torch_encoder_layers_use_the_quantized_weights_in_evaluation():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        dense = model(x)
        assert len(quantize(model)) == 2
        quantized = model(x)
    assert not torch.allclose(dense, quantized, atol=1e-3)
    torch.testing.assert_close(quantized, model.train()(x))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_half_precision_models_run(kind):
    model = tiny_model(kind).bfloat16()
    quantize(model)
    assert logits(model).dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_automatic_mixed_precision_runs_and_gives_float32_gradients():
    model = tiny_bert()
    quantize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**tiny_batch()).loss.backward()
    gradient = model.bert.pooler.dense.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_a_refusal_leaves_the_model_as_it_was():
    model = tiny_bert()
    before = logits(model)
    with pytest.raises(FiftyfoldError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query: group_size 5 does not"):
        quantize(model, granularity="per_group", group_size=5)
    with pytest.raises(FiftyfoldError, match="weight_bits must be one of"):
        quantize(model, weight_bits=16)
    assert torch.equal(logits(model), before)
    assert structure_log(model) == []
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        {"targets": {"nowhere": 0}},
        {"targets": {"bert.pooler.dense": 9}},
        {"targets": ["bert.pooler.dense"]},
        {"settings": None},
        {"settings": [{"weight": {"bits": 77}, "activation": None}] * 2},
        {"targets": {"bert.encoder": 0}},
    ],
)
def test_a_corrupt_log_is_refused(change):
    model = tiny_bert()
    with pytest.raises(FiftyfoldError):
        replay(model, [quantize_operation(model) | change])


def test_the_optimizer_goes_on():
    model = tiny_bert(layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    quantize(model, optimizer=optimizer)
    assert all(
        a is b
        for old, group in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(old, group["params"], strict=True)
    )
    model.train()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**tiny_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_bits": 1},
        {"weight_bits": 2},
        {"weight_bits": 2, "granularity": "per_group", "group_size": 8},
        {"weight_bits": 8, "granularity": "per_channel", "activation_range": "static"},
        {"weight_bits": 1, "symmetric": False, "clip": 0.5},
    ],
    ids=str,
)
def test_a_compiler_sees_one_graph_that_trains_alike(arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    quantize(model, targets=".", **arguments)
    tokens = torch.randint(50, (4, 5))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        output = run(tokens)
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        results.append([output, *gradients])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
