"""Tensor networks in models: every family, tied weights, bad input, training, export."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import export, load, quantize, tensorize
from fiftyfold.modules.structure import loading_values, replay, structure_log
from fiftyfold.modules.tensor_network import decomposition
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer, network_layers, to_dense
from tests.tiny import CAUSAL_FAMILIES, FAMILIES, tiny_batch, tiny_causal, tiny_model

FULL = 10**6


def tokens() -> dict[str, torch.Tensor]:
    batch = tiny_batch()
    del batch["labels"]
    return batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:a bond dimension", "ignore:.*as many numbers")
def test_full_bonds_change_nothing(family):
    model = tiny_model(family)
    expected = model(**tokens()).logits
    named = tensorize(model, 3, FULL, targets=".")
    assert len(named) == len(dict(network_layers(model)))
    torch.testing.assert_close(model(**tokens()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:a bond dimension", "ignore:.*as many numbers")
def test_tied_weights_stay_tied(family, dtype):
    model = tiny_causal(family).to(dtype)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tensorize(model, 2, 6, targets=".")
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    logits = model(**tokens()).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_a_layer_without_bias_gets_none():
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 4))
    bias = model[1].bias
    tensorize(model, 2, 2)
    assert model[0].bias is None
    assert model[1].bias is bias


def test_the_two_ways_to_compute_agree_with_their_gradients():
    model = nn.Sequential(nn.Linear(30, 42))
    tensorize(model, 3, 5)
    layer, x = model[0], torch.randn(7, 30)
    outputs, gradients = [], []
    for break_even in (0.0, math.inf):
        layer._break_even = break_even
        layer.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_it_compiles_without_a_break():
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 30), nn.Linear(30, 12))
    tensorize(model, 2, 2, targets=".")
    numbers = torch.arange(20)
    for break_even in (0.0, math.inf):
        model[1]._break_even = break_even
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(numbers), model(numbers))
        compiled(numbers).sum().backward()
        torch._dynamo.reset()


def test_padding_teaches_nothing():
    model = nn.Sequential(nn.Embedding(20, 12, padding_idx=0))
    tensorize(model, 2, 2, targets=".")
    model(torch.zeros(3, dtype=torch.long)).sum().backward()
    assert not model[0].weight.grad.any()


@pytest.mark.parametrize("number", [20, -1])
def test_a_number_beyond_the_table_is_an_error(number):
    model = nn.Sequential(nn.Embedding(20, 12))
    tensorize(model, 2, 2, targets=".")
    with pytest.raises(IndexError):
        model(torch.tensor([3, number]))


def test_a_network_of_rows_is_exported_for_any_number_of_tokens():
    model = nn.Sequential(nn.Embedding(20, 12))
    tensorize(model, 2, 2, targets=".")
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 8, dtype=torch.long),), dynamic_shapes=dynamic).module()
        longer = torch.randint(0, 20, (5, 9))
        assert torch.equal(program(longer), model(longer))


def test_inputs_without_entries():
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 8))
    tensorize(model, 3, 2, targets=".")
    assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 8)
    assert model(torch.tensor(3)).shape == (8,)


def test_the_optimizer_follows():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    groups = [{"params": [model[1].weight, model[0].bias], "lr": 0.1}, {"params": [model[0].weight, model[1].bias]}]
    optimizer = torch.optim.AdamW(groups, lr=0.2)
    tensorize(model, 2, 2, optimizer=optimizer)
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert held == [[id(model[1].weight), id(model[0].bias)], [id(model[0].weight), id(model[1].bias)]]


def test_replaying_needs_no_weights():
    model = tiny_model("bert")
    tensorize(model, 2, 3)
    with torch.device("meta"):
        empty = type(model)(model.config)
    replay(empty, structure_log(model))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    fresh = tiny_model("bert", seed=1)
    with loading_values():
        replay(fresh, structure_log(model))
    assert all(layer.weight.isnan().all() for _, layer in network_layers(fresh))


def test_torchs_own_encoder_layer():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        tensorize(model, 2, FULL, targets=r"linear\d")
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_a_network_can_become_dense_again():
    model = tiny_causal("gpt2")
    tensorize(model, 2, 3, targets="mlp")
    expected = model(**tokens()).logits
    for _, layer in list(network_layers(model)):
        to_dense(layer)
    assert not list(network_layers(model))
    torch.testing.assert_close(model(**tokens()).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bond_dimension": 0}, "bond_dimension must be an integer of at least 1, not 0"),
        ({"cores": 1}, "cores"),
        ({"keep": 1.5}, "keep must be a share"),
        ({"keep": 0.001}, "Raise keep"),
        ({"split": "odd"}, "split"),
        ({"split": "low_rank", "cores": 3}, "cores=2"),
        ({"targets": "nothing like it"}, "no layer's name"),
        ({"exclude": "."}, "leave nothing to tensorize"),
    ],
)
def test_bad_input_leaves_the_model_alone(arguments, message):
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FiftyfoldError, match=message):
        tensorize(model, **arguments)
    assert_unchanged(model, before)


def test_nothing_to_tensorize():
    with pytest.raises(FiftyfoldError, match="to tensorize"):
        tensorize(nn.Sequential(nn.LayerNorm(4)))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_leaves_the_model_alone(error, monkeypatch):
    model = tiny_model("bert")
    before, calls = copy.deepcopy(model.state_dict()), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return original(*_)

    original = decomposition.tensor_train
    monkeypatch.setattr(decomposition, "tensor_train", fail)
    with pytest.raises(FiftyfoldError, match="memory does not suffice"):
        tensorize(model, 2, 3)
    assert_unchanged(model, before)


def test_weights_that_are_no_numbers_leave_the_model_alone():
    model = tiny_model("bert")
    model.bert.encoder.layer[3].output.dense.weight.data[0, 0] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FiftyfoldError, match=r"layer\.3\.output.*not finite"):
        tensorize(model, 2, 3)
    assert_unchanged(model, before)


def assert_unchanged(model, before):
    assert not structure_log(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_quantized_weights_are_refused():
    model = tiny_model("bert")
    quantize(model)
    with pytest.raises(FiftyfoldError, match="cannot follow 'quantize'"):
        tensorize(model, 2, 3)


def test_clipped_bonds_are_announced_and_logged():
    model = nn.Sequential(nn.Linear(12, 8))
    with pytest.warns(UserWarning, match="allow"):
        tensorize(model, 2, 64)
    (entry,) = structure_log(model)
    assert entry["forms"][0]["terms"][0]["bonds"] == [6]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
@pytest.mark.parametrize("bits", [None, 2, 8])
@pytest.mark.filterwarnings("ignore:a bond dimension", "ignore:.*as many numbers")
def test_a_language_model_comes_back(family, bits, tmp_path):
    model = tiny_causal(family)
    tensorize(model, 2, 8, targets=".")
    if bits:
        quantize(model, weight_bits=bits, activation_bits=None, granularity="per_channel", targets=".")
    report = export(model, tmp_path / "out")
    assert report.outputs_equal is True
    loaded = load(tmp_path / "out")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    torch.testing.assert_close(loaded(**tokens()).logits, model(**tokens()).logits, atol=2e-2, rtol=1e-2)
    trained = load(tmp_path / "out", trainable=True)
    torch.testing.assert_close(trained(**tokens()).logits, loaded(**tokens()).logits, atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert {n: p.shape for n, p in trained.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(**tokens()).logits, loaded(**tokens()).logits)
    assert isinstance(next(iter(dict(network_layers(again)).values())), TensorNetworkLayer)


def test_generation_uses_the_folder(tmp_path):
    model = tiny_causal("llama")
    tensorize(model, 3, 8)
    export(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found = loaded.generate(prompt, max_new_tokens=5, do_sample=False)
    assert found.shape == (1, 8)


def test_the_folder_fails_without_the_plugin(tmp_path):
    """A dense model finds a weight of another shape, and says so."""
    model = tiny_model("bert")
    tensorize(model, 2, 3)
    export(model, tmp_path / "out")
    config = type(model.config).from_pretrained(tmp_path / "out")
    del config.quantization_config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path / "out", config=config)


@pytest.mark.parametrize("tokens", [3, 3000])
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_it_computes_in_the_type_that_a_dense_layer_does(tokens, bias):
    model = nn.Sequential(nn.Linear(64, 96, bias=bias))
    tensorize(model, 2, 5)
    x = torch.randn(tokens, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), model(x), atol=0.05, rtol=0.05)
