"""Torch's product of prepacked weights gives the bits of the integer reference, and goes where a packed layer goes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import prepacked
from tests.kernels.examples import build, cases, random_codes, reference
from tests.kernels.paths import same_bits, threads

pytestmark = pytest.mark.skipif(
    not prepacked._is_exact(), reason="torch has no exact product of prepacked weights here"
)


def check(x, codes, scale, bias, bits, **how):
    plain = scale.float().expand(len(codes), -1).t().contiguous()
    weight = prepacked.arrange(codes, bits, len(plain))
    result = prepacked.linear(x, weight, plain, bias, bits, *how.values())
    assert same_bits(result, reference(x, codes, plain, bias, **how))
    return weight, plain


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_it_gives_the_references_bits(case):
    x, codes, scale, bias, how = build(case)
    with threads(case["threads"]):
        check(x, codes, scale, bias, case["bits"], **how)


@pytest.mark.parametrize("inputs", [4096, 16384])
@pytest.mark.parametrize("bits", [1, 2])
def test_sums_neither_saturate_nor_overflow_at_the_extremes(inputs, bits):
    for weight_code in (1, -1):
        codes = torch.full((70, inputs), weight_code, dtype=torch.int8)
        for value, full_range in ((1.0, False), (-1.0, False), (-1.0, True)):
            x = torch.full((9, inputs), value)
            check(x, codes, torch.ones(1, 1), None, bits, activation_bits=8, full_range=full_range)
            check(x, codes, torch.ones(1, 1), None, bits, activation_bits=16)


def test_codes_of_eight_bits_are_none_of_its():
    """The trial that decides whether the product is used finds what saturates."""
    part = prepacked._prepack(torch.full((1, 64), 127, dtype=torch.int8), 1).parts[0]
    if prepacked._multiply(part, torch.full((1, 64), 127.0)).item() == 64 * 127 * 127:
        pytest.skip("nothing saturates on this processor")
    with pytest.raises(FiftyfoldError, match=r"allows|-1"):
        prepacked.arrange(torch.full((1, 64), 127, dtype=torch.int8), 2, 1)


def test_a_product_that_is_wrong_or_gone_is_not_used(monkeypatch):
    monkeypatch.setattr(prepacked, "int8_product_is_exact", lambda: False)
    assert prepacked.find() is not None
    with monkeypatch.context() as patch:
        patch.setattr(prepacked, "_multiply", lambda part, x: x.new_zeros(len(x), 67))
        assert prepacked.find() is None
    monkeypatch.delattr(torch, "_make_per_tensor_quantized_tensor")
    assert prepacked.find() is None


def test_the_prepacked_weight_lives_as_long_as_its_bytes():
    codes = random_codes(48, 65, 2, torch.Generator().manual_seed(0))
    x, scale = torch.randn(3, 65), torch.rand(1, 48)
    before = len(prepacked._kept)
    weight, _ = check(x, codes, scale.t(), None, 2)
    assert prepacked.prepacked_bytes(weight) == codes.numel()
    copy = weight.clone()
    assert prepacked.prepacked_bytes(copy) == 0
    assert same_bits(prepacked.linear(x, copy, scale, None, 2), prepacked.linear(x, weight, scale, None, 2))
    assert prepacked.prepacked_bytes(copy) == codes.numel()
    del weight, copy
    gc.collect()
    assert len(prepacked._kept) == before


def test_the_users_engine_stays(monkeypatch):
    for engine in torch.backends.quantized.supported_engines:
        monkeypatch.setattr(torch.backends.quantized, "engine", engine)
        check(torch.randn(2, 30), random_codes(5, 30, 1, torch.Generator()), torch.ones(1, 1), None, 1)
        assert torch.backends.quantized.engine == engine


def test_threads_prepack_at_once():
    before = torch.backends.quantized.engine
    codes = random_codes(64, 100, 2, torch.Generator().manual_seed(0))
    x, scale = torch.randn(5, 100), torch.rand(1, 64)
    weight = prepacked.arrange(codes, 2, 1).clone()
    expected = reference(x, codes, scale, None)
    results = []
    work = [
        threading.Thread(target=lambda: results.append(prepacked.linear(x, weight, scale, None, 2))) for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(results) == len(work)
    assert all(same_bits(result, expected) for result in results)
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize(
    "change",
    [
        {"weight": lambda w: w[:-1]},
        {"weight": lambda w: w.view(torch.int8)},
        {"x": lambda x: x[:, :32]},
        {"bits": lambda _: 1},
        {"bits": lambda _: 8},
        {"scale": lambda s: s[:, :-1]},
    ],
)
def test_a_weight_that_was_not_arranged_for_the_call_is_refused(change):
    arguments = {"x": torch.ones(2, 64), "weight": prepacked.arrange(torch.ones(40, 64, dtype=torch.int8), 2, 1)}
    arguments |= {"scale": torch.ones(1, 40), "bias": None, "bits": 2}
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(FiftyfoldError, match="not arranged"):
        prepacked.linear(**arguments)


PROGRAM = """
import copy, io, pickle, sys
import torch
from fiftyfold.kernels import prepacked
from tests.kernels.test_operators import packed_model, test_the_operators_pass_torchs_own_checks

prepacked.int8_product_is_exact = lambda: False  # as on a processor without VNNI
model = packed_model()
tokens, longer = torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (5, 9))
weight = model[1].arranged()[0]
assert prepacked.prepacked_bytes(weight) == 96 * 64, "the layer is ready before its first call"
with torch.no_grad():
    expected = model(longer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float32)):
        assert torch.equal(other(longer), expected)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(longer), expected)
    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (tokens,), dynamic_shapes=dynamic), file)
    assert len(file.getvalue()) < 96 * 64 + 50_000, "the weights are there as bits, not as bytes"
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(longer), expected)
test_the_operators_pass_torchs_own_checks()
"""


def test_without_a_library_packed_layers_are_copied_compiled_exported_and_checked():
    environment = os.environ | {"FIFTYFOLD_KERNELS": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
