"""The Triton kernels give the bits of plain torch: interpreted on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import triton as triton_kernels
from fiftyfold.kernels.activations import symmetric_codes, symmetric_scale, token_magnitudes
from fiftyfold.kernels.linear import integer_linear
from fiftyfold.kernels.packing import pack_codes, unpack_rows
from fiftyfold.kernels.triton import linear
from fiftyfold.kernels.triton.activations import fake_quantize_tokens, quantize_tokens
from fiftyfold.kernels.triton.backend import BACKEND, arrange
from fiftyfold.kernels.triton.planes import arranged_bytes, from_planes, to_planes
from fiftyfold.kernels.triton.weights import fake_quantize_weight
from fiftyfold.modules.quantization.quantizers import (
    dequantize_weight,
    fake_quantize_activation,
    fused_weight_arguments,
    quantize_weight,
)
from fiftyfold.modules.quantization.settings import ActivationSettings, WeightSettings

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter cuts float32 off to bfloat16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
GRIDS = [
    {},
    {"full_range": True},
    {"bits": 4},
    {"bits": 16},
    {"clip": 0.7},
    {"largest": torch.tensor(1.5, device=DEVICE)},
]


def codes_of(bits: int, outputs: int, inputs: int) -> torch.Tensor:
    largest = max(1, 2 ** (bits - 1) - 1)
    drawn = torch.randint(-largest, largest + 1, (outputs, inputs), device=DEVICE)
    return (torch.where(drawn > 0, 1, -1) if bits == 1 else drawn).to(torch.int8)


def assert_equal_to_the_reference(x, codes, weight_bits, bias=None, **grid):
    scale = torch.rand(1, len(codes), device=DEVICE) + 0.1
    chosen = [grid.get(name, default) for name, default in (("bits", 8), ("full_range", False), ("clip", None))]
    found = BACKEND.linear(x, arrange(codes, weight_bits, 1), scale, bias, weight_bits, *chosen, grid.get("largest"))
    on_cpu = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in grid.items()}
    expected = integer_linear(x.cpu(), codes.cpu(), scale.cpu(), None if bias is None else bias.cpu(), **on_cpu)
    assert torch.equal(found.cpu().nan_to_num(7e4), expected.nan_to_num(7e4))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [(1, 1, 1), (1, 700, 17), (2, 256, 33), (5, 40, 70), (17, 700, 10), (40, 31, 5)],
)
def test_linear(bits, tokens, inputs, outputs):
    x = torch.randn(tokens, inputs, device=DEVICE)
    bias = torch.randn(outputs, device=DEVICE)
    assert_equal_to_the_reference(x, codes_of(bits, outputs, inputs), bits, bias)


@pytest.mark.parametrize("grid", GRIDS[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_every_grid_and_type(grid, dtype):
    x = torch.randn(2, 3, 50, device=DEVICE).to(dtype)
    assert_equal_to_the_reference(x, codes_of(2, 9, 50), 2, **grid)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize(("tokens", "sign"), [(1, 1), (3, -1)])
def test_the_largest_sums(bits, tokens, sign):
    codes = torch.full((2, 4096), sign, dtype=torch.int8, device=DEVICE)
    assert_equal_to_the_reference(torch.full((tokens, 4096), -3.0, device=DEVICE), codes, bits, full_range=True)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("split", "blocks"), [(2, 1), (3, 1), (1, 2), (2, 2), (1, 8)])
def test_how_a_product_is_shared_out_changes_no_bit(bits, tokens, split, blocks):
    quantized = quantize_tokens(torch.randn(tokens, 1300, device=DEVICE))
    packed, scale = to_planes(codes_of(bits, 20, 1300), bits), torch.rand(1, 20, device=DEVICE)
    whole = linear.multiply_planes(quantized, packed, scale, weight_bits=bits, plan=linear.Plan(16, 16, 1, 1))
    shared = linear.Plan(16, 32, blocks, split)
    assert torch.equal(linear.multiply_planes(quantized, packed, scale, weight_bits=bits, plan=shared), whole)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("tokens", [5, 16, 20, 60, 100, 600])
def test_every_plan_that_is_chosen(bits, tokens):
    assert_equal_to_the_reference(torch.randn(tokens, 600, device=DEVICE), codes_of(bits, 70, 600), bits)


def test_the_split_fills_a_gpu_and_no_more():
    assert linear._split(programs=256, reads=16, processors=132) == 2
    assert linear._split(programs=12, reads=16, processors=132) == 16
    assert linear._split(programs=12, reads=3, processors=132) == 2
    assert linear._split(programs=1000, reads=16, processors=132) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", [{}, {"largest": torch.tensor(2.0, device=DEVICE)}], ids=["dynamic", "static"])
def test_what_is_not_finite_stays_in_its_token(value, grid):
    x = torch.randn(3, 30, device=DEVICE)
    x[1, 7] = value
    assert_equal_to_the_reference(x, codes_of(1, 6, 30), 1, **grid)


@pytest.mark.parametrize("x", [torch.zeros(2, 9), torch.full((2, 9), 1e-40), torch.zeros(0, 9), torch.ones(9)])
def test_small_and_odd_inputs(x):
    assert_equal_to_the_reference(x.to(DEVICE), codes_of(2, 5, 9), 2, torch.randn(5, device=DEVICE))


def test_a_view_with_strides():
    x = torch.randn(9, 4, device=DEVICE).t()
    assert_equal_to_the_reference(x, codes_of(2, 5, 9), 2)


@pytest.mark.parametrize("bits", [1, 2])
def test_planes_hold_every_byte(bits):
    codes = codes_of(bits, 3, 2 * 256 + 5)
    assert torch.equal(from_planes(to_planes(codes, bits), bits, codes.shape[1]), codes)
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(4, 64)
    if bits == 1:
        assert torch.equal(to_planes(from_planes(packed, 1, 512), 1), packed)


def test_scales_per_group_keep_their_codes():
    codes = codes_of(2, 4, 12)
    assert arrange(codes, 2, groups=3) is codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantized_tokens(grid, dtype):
    x = (3 * torch.randn(3, 70, device=DEVICE)).to(dtype)
    settings = ActivationSettings(**{name: value for name, value in grid.items() if name != "largest"})
    limits = {"low": -grid["largest"], "high": grid["largest"]} if "largest" in grid else {}
    assert torch.equal(fake_quantize_tokens(x, **grid), fake_quantize_activation(x, settings, **limits))


def test_ties_round_to_even():
    # With 127 as the largest magnitude the scale is 1.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], device=DEVICE)
    codes, scale, sums = quantize_tokens(x)
    assert codes[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -126]
    assert (float(scale), int(sums)) == (1.0, 3)
    assert not codes[0, 7:].any()


def test_quantized_tokens_longer_than_a_chunk():
    x = torch.randn(2, 5000, device=DEVICE)
    codes, scale, sums = quantize_tokens(x)
    expected_scale = symmetric_scale(token_magnitudes(x), 8, False)
    expected = symmetric_codes(x, expected_scale, 8, False)
    assert torch.equal(codes[:, :5000].float(), expected)
    assert torch.equal(scale, expected_scale[:, 0])
    assert torch.equal(sums, expected.sum(1).int())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embedding(bits, dtype):
    codes = codes_of(bits, 11, 261)
    packed = pack_codes(codes, bits)
    scale = torch.rand(11, 1, device=DEVICE).half()
    tokens = torch.tensor([[0, 10, 3], [10, 10, 7]], device=DEVICE)
    found = BACKEND.embedding(tokens, packed, scale, bits, 261, dtype)
    assert torch.equal(found, (unpack_rows(packed, bits, tokens, 261) * scale.float()[tokens]).to(dtype))


def linear_arguments(bits=2, outputs=8, inputs=256):
    weight = arrange(codes_of(bits, outputs, inputs), bits, 1)
    x, scale = torch.ones(2, inputs, device=DEVICE), torch.ones(1, outputs, device=DEVICE)
    return {"x": x, "weight": weight, "scale": scale, "bias": None, "bits": bits}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("x", lambda x, inputs=inputs: x.new_ones(2, inputs)) for inputs in (1, 128, 200, 250, 255, 257, 300, 512)),
        ("x", lambda x: x[0, 0]),
        ("x", lambda x: x.long()),
        ("weight", lambda weight: weight[:-1]),
        ("weight", lambda weight: weight[: weight.numel() // 2].clone()),
        ("weight", lambda weight: weight.view(torch.int8)),
        ("scale", lambda scale: scale[:, :-1].contiguous()),
        ("scale", lambda scale: scale.expand(2, -1).contiguous()),
        ("scale", lambda scale: scale.half()),
        ("scale", lambda scale: scale[0]),
        ("bias", lambda _: torch.ones(3, device=DEVICE)),
        ("bits", lambda bits: 3 - bits),
        ("bits", lambda bits: 4),
        ("largest", lambda _: torch.ones(2, device=DEVICE)),
    ],
)
@pytest.mark.parametrize("bits", [1, 2])
def test_a_weight_that_was_not_arranged_for_the_call_is_refused(bits, name, change):
    arguments = linear_arguments(bits)
    arguments[name] = change(arguments.get(name))
    with pytest.raises(FiftyfoldError):
        BACKEND.linear(**arguments)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("outputs", [1, 2, 7])
def test_an_arranged_weight_tells_how_many_inputs_it_has(bits, outputs):
    assert len({arranged_bytes(outputs, inputs, bits) for inputs in range(1, 2000)}) == 1999


def test_a_bias_with_strides():
    bias = torch.randn(8, 2, device=DEVICE)[:, 0]
    arguments = linear_arguments() | {"bias": bias}
    expected = BACKEND.linear(**arguments | {"bias": bias.clone()})
    assert torch.equal(BACKEND.linear(**arguments), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda packed: packed[:-1]),
        ("packed", lambda packed: packed.view(torch.int8)),
        ("packed", lambda packed: packed.view(1, -1)),
        ("scale", lambda scale: scale[:-1]),
        ("scale", lambda scale: scale[:, 0]),
        ("columns", lambda columns: columns - 3),
    ],
)
def test_packed_rows_of_a_wrong_length_are_refused(name, change):
    arguments = {
        "tokens": torch.tensor([0], device=DEVICE),
        "packed": pack_codes(codes_of(2, 11, 13), 2),
        "scale": torch.ones(11, 1, device=DEVICE).half(),
        "bits": 2,
        "columns": 13,
        "dtype": torch.float32,
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(FiftyfoldError, match="do not fit an embedding"):
        BACKEND.embedding(**arguments)


def test_an_embedding_refuses_a_row_that_is_not_there():
    packed = pack_codes(codes_of(1, 4, 8), 1)
    if not ON_GPU:
        with pytest.raises(RuntimeError):
            BACKEND.embedding(torch.tensor([4]), packed, torch.ones(4, 1).half(), 1, 8, torch.float32)


@pytest.mark.parametrize(
    ("missing", "reason"), [("triton", "triton is not installed"), ("triton.knobs", "triton is older than 3.4")]
)
def test_a_machine_without_triton_computes_with_plain_torch(missing, reason, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else True)
    assert triton_kernels.find_backend() is None
    assert reason in caplog.text


@pytest.mark.parametrize(("capability", "shared_kilobytes"), [(86, 99), (90, 227)])
def test_machine_code_has_what_makes_it_fast_and_exact(capability, shared_kilobytes, tmp_path):
    """Compiling needs no GPU, and shows what the interpreter cannot."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(capability)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    kernels = json.loads(output)
    for name, found in kernels.items():
        # A fused multiplication or an approximate division would change a bit; local memory means spilled registers.
        assert (found["fused"], found["approximate"], found["local"]) == (0, 0, 0), name
        assert found["bytes"] > 0
        assert found["shared"] <= shared_kilobytes * 1024, name
        if name.startswith("tokens"):
            assert found["dp4a"], name
        if name.startswith("matrix"):
            assert found["tensor_cores"], name


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize(("granularity", "group"), [("per_tensor", None), ("per_channel", None), ("per_group", 6)])
@pytest.mark.parametrize("clip", [None, 0.03])
def test_fake_quantized_weights(bits, granularity, group, clip):
    how = WeightSettings(bits, granularity, group, clip)
    weight = 0.02 * torch.randn(5, 66, device=DEVICE)
    weight[0, :40] = 0
    weight[1, 0] = -0.0
    found = fake_quantize_weight(weight, **fused_weight_arguments(weight, how))
    assert torch.equal(found, dequantize_weight(*quantize_weight(weight, how)))
