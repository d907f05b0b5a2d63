"""The operators are ones to torch's tools: shapes without values, compiled and exported graphs, schemas."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.operators import arrange_weight, packed_embedding, packed_linear
from fiftyfold.kernels.packing import pack_codes, packed_bytes
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.packed.layers import prepare_layers
from fiftyfold.modules.quantization.layers import activate
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings
from tests.kernels.paths import library, same_bits, threads


def embedding_arguments(bits, columns, rows=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, bits + 1, (rows, columns), generator=generator)
    codes = (codes * 2 - 1 if bits == 1 else codes - 1).to(torch.int8)
    return codes, pack_codes(codes, bits), torch.rand(rows, 1, generator=generator).half()


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("columns", [1, 3, 5, 8, 40, 77, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_an_embedding_reads_the_stored_rows(bits, columns, dtype, index):
    codes, packed, scale = embedding_arguments(bits, columns)
    tokens = torch.tensor([[0, 10, 3], [10, 10, 7]], dtype=index).t()
    expected = (codes.float() * scale.float())[tokens.long()].to(dtype)
    assert same_bits(packed_embedding(tokens, packed, scale, bits=bits, columns=columns, dtype=dtype), expected)
    none = packed_embedding(tokens[:0], packed, scale, bits=bits, columns=columns, dtype=dtype)
    assert none.shape == (0, 2, columns)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_the_rows_of_an_embedding(count):
    codes, packed, scale = embedding_arguments(2, 768, rows=300)
    tokens = torch.randint(0, 300, (257,), generator=torch.Generator().manual_seed(1))
    with threads(count):
        result = packed_embedding(tokens, packed, scale, bits=2, columns=768, dtype=torch.float32)
    assert torch.equal(result, (codes.float() * scale.float())[tokens])


def test_all_bytes_of_a_stored_embedding():
    for bits, values in ((1, 256), (2, 243)):
        packed = torch.arange(values).to(torch.uint8)
        columns = 8 if bits == 1 else 5
        digits = torch.arange(values).unsqueeze(1) // (bits + 1) ** torch.arange(columns) % (bits + 1)
        codes = digits * 2 - 1 if bits == 1 else digits - 1
        result = packed_embedding(
            torch.arange(values), packed, torch.ones(values, 1).half(), bits=bits, columns=columns, dtype=torch.float32
        )
        assert torch.equal(result, codes.float())
    for byte in range(243, 256):
        # The library of the CPU raises torch's error, torch's own operations ours.
        with pytest.raises((RuntimeError, FiftyfoldError), match="altered"):
            packed_embedding(
                torch.tensor([0]),
                torch.tensor([byte]).to(torch.uint8),
                torch.ones(1, 1).half(),
                bits=2,
                columns=5,
                dtype=torch.float32,
            )


@pytest.mark.parametrize("token", [-1, 11])
def test_a_row_that_is_not_there_is_an_index_error(token):
    _, packed, scale = embedding_arguments(2, 13)
    with pytest.raises(IndexError, match="between 0 and 10"):
        packed_embedding(torch.tensor([0, token]), packed, scale, bits=2, columns=13, dtype=torch.float32)


def test_packed_rows_of_a_wrong_length_are_refused():
    library()
    _, packed, scale = embedding_arguments(2, 13)
    for wrong in (packed[:-1], packed.view(1, -1), packed.to(torch.int32)):
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.fiftyfold.packed_embedding.default(torch.tensor([0]), wrong, scale, 2, 13, torch.float32)


def test_the_operators_pass_torchs_own_checks():
    weight, scale = arrange_weight(torch.ones(24, 40, dtype=torch.int8), torch.rand(24, 1), 2)
    x, bias = torch.randn(2, 3, 40), torch.randn(24)
    for arguments in ((x, weight, scale, bias, 2), (x, weight, scale, None, 2, 8, True, 0.5, torch.tensor(1.0))):
        torch.library.opcheck(torch.ops.fiftyfold.packed_linear.default, arguments)
    _, packed, rows = embedding_arguments(2, 13)
    for name in ("packed_embedding", "unpacked_embedding"):
        operator = getattr(torch.ops.fiftyfold, name).default
        torch.library.opcheck(operator, (torch.tensor([[1, 2]]), packed, rows, 2, 13, torch.float32))


def packed_model(dtype=torch.float32):
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(50, 96), nn.Linear(96, 64)
    activate(embedding, LayerSettings(WeightSettings(2, "per_channel")))
    activate(linear, LayerSettings(WeightSettings(1), ActivationSettings()))
    layers = [pack_layer("layer", layer, packed_entry(layer)) for layer in (embedding, linear)]
    model = nn.Sequential(layers[0], layers[1], nn.ReLU()).eval().to(dtype)
    prepare_layers(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_compile_without_a_break_for_any_number_of_tokens(dtype):
    model = packed_model(dtype)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    with torch.no_grad():
        for shape in ((2, 3), (1, 7), (4, 5)):
            tokens = torch.randint(0, 50, shape)
            assert torch.equal(compiled(tokens), model(tokens))
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert {"fiftyfold.packed_linear.default", "fiftyfold.packed_embedding.default"} <= targets


def test_packed_layers_are_exported_and_come_back():
    library()
    model = packed_model()
    tokens = torch.randint(0, 50, (2, 6))
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    with torch.no_grad():
        program = torch.export.export(model, (tokens,), dynamic_shapes=dynamic)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        longer = torch.randint(0, 50, (5, 9))
        assert torch.equal(loaded(longer), model(longer))
    # The layer's 96 * 64 weights are there as bits, not as bytes.
    assert len(file.getvalue()) < 96 * 64 + 50_000


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("activation", [None, ActivationSettings(), ActivationSettings(range="static")])
def test_a_layer_of_any_kind_is_exported_for_any_number_of_tokens(bits, activation):
    linear = nn.Linear(96, 64)
    activate(linear, LayerSettings(WeightSettings(bits), activation))
    if activation is not None and activation.range == "static":
        linear.train()(torch.randn(4, 96))
    model = pack_layer("layer", linear.eval(), packed_entry(linear))
    model.forget_codes()  # as of a folder that was just opened
    prepare_layers(model)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 6, 96),), dynamic_shapes=dynamic).module()
        longer = torch.randn(5, 9, 96)
        assert torch.equal(program(longer), model(longer))


def test_an_arranged_weight_takes_its_bits():
    library()
    for bits in (1, 2):
        weight, scale = arrange_weight(torch.ones(768, 768, dtype=torch.int8), torch.ones(1, 1), bits)
        assert weight.numel() == 768 * 768 * bits // 8 + 64  # and what says what it is
        assert scale.shape == (1, 768)
    assert packed_bytes(768 * 768, 1) == 768 * 768 // 8


def test_a_model_that_moves_between_types_stays_ready():
    model = packed_model()
    tokens = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        expected = model(tokens)
        model.to(torch.bfloat16).to(torch.float32)
        assert model[1]._arranged is not None
        assert torch.allclose(model(tokens), expected, atol=1e-2)


def test_shapes_are_known_without_values():
    library()
    weight, scale = arrange_weight(torch.ones(24, 40, dtype=torch.int8), torch.rand(24, 1), 2)
    assert packed_linear(torch.ones(2, 40, device="meta"), weight, scale, bits=2).shape == (2, 24)
