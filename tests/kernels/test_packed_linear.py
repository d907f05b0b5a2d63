"""All paths give the bits of one integer reference, whatever the shape, type, thread count and data."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from fiftyfold.kernels.operators import arrange_weight, packed_linear
from fiftyfold.kernels.table_product import find_entries, multiply_rows
from tests.kernels.examples import build, cases, random_codes, reference
from tests.kernels.paths import library, path, same_bits, threads

PATHS = ("amx", "avx512", "avxvnni", "avx2", "neondot", "neon", "portable")


def check(x, codes, scale, bias, bits, **how):
    weight, arranged = arrange_weight(codes, scale, bits)
    plain = scale.float().expand(len(codes), -1).t().contiguous()
    expected = reference(x, codes, plain, bias, **how)
    result = packed_linear(x, weight, arranged, bias, bits=bits, **how)
    assert same_bits(result, expected)
    assert same_bits(packed_linear(x, codes, plain, bias, bits=bits, **how), expected)


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_every_path_gives_the_references_bits(name, case):
    x, codes, scale, bias, how = build(case)
    with path(name), threads(case["threads"]):
        check(x, codes, scale, bias, case["bits"], **how)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 70), (16384, 70), (1056, 270)])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("rows", [1, 9])
def test_sums_do_not_overflow_at_the_extremes(name, inputs, outputs, bits, rows):
    for weight_code in (1, -1):
        codes = torch.full((outputs, inputs), weight_code, dtype=torch.int8)
        for value, full_range in ((1.0, False), (-1.0, False), (-1.0, True)):
            x = torch.full((rows, inputs), value)
            with path(name):
                check(x, codes, torch.ones(1, 1), None, bits, full_range=full_range)
                check(x, codes, torch.ones(1, 1), None, bits, activation_bits=16)


@pytest.mark.parametrize("name", PATHS)
def test_all_bytes_that_an_arrangement_can_hold(name):
    binary = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    ternary = torch.arange(81).unsqueeze(1) // 3 ** torch.arange(4) % 3
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with path(name):
        for bits, digits in ((1, binary * 2 - 1), (2, ternary - 1)):
            # Digit g of a byte is the code of input 4 * g + i.
            codes = digits.repeat_interleave(4, dim=1).to(torch.int8)
            check(x[:, : codes.shape[1]], codes, torch.ones(1, 1), None, bits)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("tokens", [95, 96, 97, 200])
def test_blocks_of_tokens_and_threads_meet_without_a_gap(name, bits, tokens):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 130, generator=generator)
    codes = random_codes(330, 130, bits, generator)
    scale = torch.rand(330, 1, generator=generator).half()
    for count in (1, 2, 3):
        with path(name), threads(count):
            check(x, codes, scale, torch.randn(330, generator=generator), bits)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("tokens", "inputs"), [(5, 16384), (9, 8192)])
def test_rows_so_long_that_few_of_their_tables_fit_into_memory(name, tokens, inputs, activation_bits):
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(tokens, inputs, generator=generator), random_codes(256, inputs, 1, generator)
    for count in (1, 2, 3):
        with path(name), threads(count):
            check(x, codes, torch.rand(256, 1, generator=generator).half(), None, 1, activation_bits=activation_bits)


@pytest.mark.parametrize(("outputs", "bits", "looked_up"), [(256, 1, True), (255, 1, False), (256, 2, False)])
def test_binary_weights_are_looked_up_where_products_are_slow(outputs, bits, looked_up):
    """Only lookups read what is arranged for them."""
    codes = random_codes(outputs, 96, bits, torch.Generator().manual_seed(0))
    for name in library().paths():
        with path(name):
            weight, _ = arrange_weight(codes, torch.ones(1, 1), bits)
        in_planes = library().functions.ff_is_in_planes(ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(len(weight)))
        assert bool(in_planes) == (looked_up and name in {"avx2", "neon"})


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("outputs", [255, 273])
@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
def test_what_one_path_arranged_every_other_reads(outputs, bits, tokens):
    """As where a program that was compiled on one processor runs on another."""
    generator = torch.Generator().manual_seed(tokens)
    x, codes = torch.randn(tokens, 96, generator=generator), random_codes(outputs, 96, bits, generator)
    scale, bias = torch.rand(outputs, 2, generator=generator), torch.randn(outputs, generator=generator)
    names, results = library().paths(), []
    for name in names:
        with path(name):
            weight, arranged = arrange_weight(codes, scale, bits)
        for other in names:
            for count in (1, 2):
                with path(other), threads(count):
                    results.append(packed_linear(x, weight, arranged, bias, bits=bits))
    assert all(same_bits(result, results[0]) for result in results)


def test_halves_of_codes_are_rounded_to_even():
    """Dividing 127 by the range first, as torch does with a number on the left, rounds some of these otherwise."""
    x = torch.cat([torch.tensor([127.0]), torch.arange(-126.5, 126.5, 1.0)]).unsqueeze(0) * 0.1
    codes = random_codes(40, x.shape[1], 2, torch.Generator().manual_seed(0))
    for name in library().paths():
        with path(name):
            check(x, codes, torch.rand(40, 1).half(), None, 2)


def test_two_passes_are_finer_than_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 768, generator=generator)
    codes = random_codes(64, 768, 2, generator)
    weight, scale = arrange_weight(codes, torch.ones(1, 1), 2)
    exact = x.double() @ codes.double().t()
    error = {
        bits: (packed_linear(x, weight, scale, bits=2, activation_bits=bits) - exact).norm() / exact.norm()
        for bits in (8, 16)
    }
    assert error[16] < 1e-4
    assert error[16] < error[8] / 100


def test_one_pool_of_threads():
    library()
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    with open("/proc/self/maps") as maps:
        pools = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len({os.path.realpath(pool) for pool in pools}) <= 1


def _packed(x, codes):
    weight, scale = arrange_weight(codes, torch.ones(1, 1), 2)
    return packed_linear(x, weight, scale, bits=2)


def _by_tables(x, codes):
    return multiply_rows(x, find_entries(codes, 2), torch.ones(1, 1).half(), 2, codes.shape[1])


def _in_child(queue, product, x, codes):
    queue.put((library().threads(), product(x, codes).numpy()))


@pytest.mark.parametrize("product", [_packed, _by_tables])
def test_a_forked_process_computes_alone(product):
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(256, 768, generator=generator), random_codes(768, 768, 2, generator)
    library()
    with threads(2):
        expected = product(x, codes)  # the parent's pool has threads now
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(queue, product, x, codes))
        child.start()
        count, result = queue.get(timeout=60)
        child.join(60)
    assert count == 1
    assert torch.equal(torch.from_numpy(result), expected)


def test_a_forked_process_that_is_the_first_to_load_the_library_computes_alone():
    library()
    program = (
        "import os, torch; from fiftyfold.kernels.cpu import cpu_status;"
        "from fiftyfold.kernels.operators import arrange_weight, packed_linear;"
        "torch.set_num_threads(2); x = torch.randn(512, 512); x @ x; codes = torch.ones(768, 512, dtype=torch.int8);"
        "scale = torch.ones(1, 1); child = os.fork(); status = os.waitpid(child, 0)[1] if child else None;"
        "packed_linear(x, *arrange_weight(codes, scale, 2), bits=2);"
        "print(cpu_status().library.threads(), flush=True); os._exit(status or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": lambda w: w[:-1]}, "not arranged"),
        ({"weight": lambda w: w.view(-1, 2)}, "not arranged"),
        ({"weight": lambda w: torch.cat([w, w[:64]])}, "not arranged"),
        ({"weight": lambda w: torch.cat([w, w])[::2]}, "not arranged"),
        ({"x": lambda x: x[..., :16]}, "not arranged"),
        ({"x": lambda x: x[..., :63]}, "not arranged"),
        ({"x": lambda x: x[..., :0]}, "do not divide"),
        ({"x": lambda x: x.long()}, "float32, bfloat16 or float16"),
        ({"scale": lambda s: s.half()}, "float32 matrix"),
        ({"scale": lambda s: s[:, :-1]}, "not arranged"),
        ({"scale": lambda s: s[:, :30]}, "not arranged"),
        ({"scale": lambda s: s.t()}, "do not divide|not arranged"),
        ({"scale": lambda s: s.expand(3, -1).contiguous()}, "do not divide"),
        ({"bias": lambda b: b[:-1]}, "one entry for each output"),
        ({"bias": lambda b: b.long()}, "bias must be float32"),
        ({"bits": lambda _: 3}, "1 or 2 bits"),
        ({"bits": lambda _: 1}, "not arranged"),
        ({"activation_bits": lambda _: 32}, "4, 8 or 16 bits"),
        ({"clip": lambda _: float("nan")}, "clip must be positive"),
        ({"largest": lambda _: torch.ones(2)}, "one float32 number"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_kernel_sees_it(change, message):
    library()
    weight, scale = arrange_weight(torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1), 2)
    arguments = {"x": torch.ones(2, 64), "weight": weight, "scale": scale, "bias": torch.ones(64)}
    arguments |= {"bits": 2, "activation_bits": 8, "full_range": False, "clip": None, "largest": None}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fiftyfold.packed_linear.default(*arguments.values())


def test_without_a_library_torch_computes_the_same():
    program = (
        "import torch; from fiftyfold.kernels.operators import arrange_weight, packed_linear;"
        "torch.manual_seed(0); codes = (torch.randint(0, 3, (40, 50)) - 1).to(torch.int8);"
        "weight, scale = arrange_weight(codes, torch.rand(40, 1), 2);"
        "print(packed_linear(torch.randn(7, 50), weight, scale, bits=2).sum().item().hex())"
    )
    environment = os.environ | {"FIFTYFOLD_KERNELS": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "torch's own operations" in done.stderr
    torch.manual_seed(0)
    codes = (torch.randint(0, 3, (40, 50)) - 1).to(torch.int8)
    weight, scale = arrange_weight(codes, torch.rand(40, 1), 2)
    expected = packed_linear(torch.randn(7, 50), weight, scale, bits=2)
    assert done.stdout.split() == [expected.sum().item().hex()]
