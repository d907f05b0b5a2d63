"""Packed linear layers against torch's own products: times of one call, measured side by side on this processor.

Every candidate is timed in turn in each round, after a call that warms it up; the figures are medians over the rounds.
One thread counts the time it computed, several the time that passed: measure those on an idle machine. A layer's time
is all of it, from float32 input to float32 output; rows marked (bare) leave out quantizing and rescaling. For example:

    python benchmarks/packed_linear.py --threads 1 2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import prepacked
from fiftyfold.kernels.cpu import CpuLibrary, cpu_status
from fiftyfold.kernels.operators import arrange_weight, packed_linear

RESULTS = Path(__file__).parent / "results" / "packed_linear.json"
SHAPES = ((768, 768), (768, 3072), (3072, 768))
TOKENS = (1, 16, 128, 1024)
ROUNDS = 11
WINDOW = 2e-3
LONGEST = 0.5
STREAMED = 4096

Call = Callable[[], object]


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--path", help="instruction set, instead of the fastest that the processor has")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    library = cpu_status().library
    if library is None:
        raise FiftyfoldError(f"there are no kernels to measure: {cpu_status().reason}.")
    if arguments.path:
        library.choose_path(arguments.path)
    measured = {}
    with torch.inference_mode():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            measured[threads] = measure(library, threads)
    result = {"processor": processor(), "torch": torch.__version__, "path": library.path(), "threads": measured}
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")


def measure(library: CpuLibrary, threads: int) -> dict[str, object]:
    """Return everything that one number of threads gives."""
    peak, bandwidth = limits(library, threads)
    print(
        f"\n{threads} thread(s), {library.path()}: products {peak / 1e9:.0f} Gop/s, memory {bandwidth / 1e9:.1f} GB/s"
    )
    cells = [measure_cell(tokens, *shape, threads, peak) for shape in SHAPES for tokens in TOKENS]
    return {"peak": peak, "bandwidth": bandwidth, "cells": cells, "streamed": measure_streamed(threads, bandwidth)}


def limits(library: CpuLibrary, threads: int) -> tuple[float, float]:
    """Return operations and bytes a second: of the path's product instructions, and from memory."""
    functions = library.functions
    functions.ff_peak.restype = functions.ff_read_bandwidth.restype = ctypes.c_double
    functions.ff_peak.argtypes = [ctypes.c_int32, ctypes.c_int64]
    functions.ff_read_bandwidth.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
    memory = torch.ones(2**28, dtype=torch.uint8)
    peak = max(functions.ff_peak(threads, 5_000_000) for _ in range(5))
    return peak, max(functions.ff_read_bandwidth(threads, memory.data_ptr(), memory.numel()) for _ in range(5))


def measure_cell(tokens: int, inputs: int, outputs: int, threads: int, peak: float) -> dict[str, object]:
    """Time all candidates on one shape."""
    times = time_in_turn(candidates(tokens, inputs, outputs), threads)
    operations = 2 * tokens * inputs * outputs
    default = times["float32"]
    print(f"{tokens:5} tokens, {inputs:4} -> {outputs:4}: float32 {default * 1e6:9.1f} us", end="")
    for name, seconds in times.items():
        print(f" | {name} {default / seconds:.2f}", end="")
    shares = {name: operations / times[name] / peak if peak else None for name in ("binary", "ternary")}
    print(f" | share of peak {shares['ternary'] or 0:.2f}", flush=True)
    microseconds = {name: round(seconds * 1e6, 2) for name, seconds in times.items()}
    return {"tokens": tokens, "inputs": inputs, "outputs": outputs, "microseconds": microseconds, "peak_share": shares}


def candidates(tokens: int, inputs: int, outputs: int) -> dict[str, Call]:
    """Return what is timed, by name."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    calls: dict[str, Call] = {"float32": lambda: F.linear(x, weight, bias)}
    calls["float32, oneDNN"] = lambda: with_onednn(lambda: F.linear(x, weight, bias))
    for engine in int8_engines():
        calls[f"int8 dynamic, {engine}"] = dynamic_int8(x, weight, bias, engine)
    integers = torch.randint(-127, 128, (tokens, inputs)).to(torch.int8)
    for bits, name in ((1, "binary"), (2, "ternary")):
        codes = random_codes(outputs, inputs, bits)
        arranged, scale = arrange_weight(codes, torch.rand(outputs, 1), bits)
        calls[name] = packed_call(x, arranged, scale, bias, bits, 8)
    calls["ternary, 16 bits"] = packed_call(x, arranged, scale, bias, bits, 16)
    calls["ternary, torch alone"] = torch_alone(x, codes, scale, bias, bits)
    calls["int8 product (bare)"] = lambda: torch._int_mm(integers, codes.t())
    return calls


def int8_engines() -> list[str]:
    """Return torch's engines for 8-bit layers that are made for this processor."""
    supported = torch.backends.quantized.supported_engines
    return [engine for engine in ("x86", "onednn") if engine in supported] or ["qnnpack"]


def packed_call(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int, activation_bits: int
) -> Call:
    """Return a call of the packed layer."""
    return lambda: packed_linear(x, weight, scale, bias, bits=bits, activation_bits=activation_bits)


def torch_alone(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, bits: int) -> Call:
    """Return a call of the packed layer as it is computed where there is no library."""
    backend = prepacked.find()
    if backend is None or backend.linear is None:
        return packed_call(x, codes, scale, bias, bits, 8)
    return partial(backend.linear, x, backend.arrange(codes, bits, 1), scale, bias, bits)


def dynamic_int8(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, engine: str) -> Call:
    """Return a call of torch's dynamically quantized layer."""
    torch.backends.quantized.engine = engine
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8), bias)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=False)


def with_onednn(call: Call) -> object:
    """Call while float32 products go to oneDNN, which torch does not choose by itself."""
    with float32_precision("bf16"):
        return call()


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products inside the block."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def measure_streamed(threads: int, bandwidth: float) -> dict[str, object]:
    """Time one token through many large layers in turn, whose weights come from memory each time."""
    x = torch.randn(1, STREAMED)
    layers = 48
    dense = [torch.randn(STREAMED, STREAMED) for _ in range(8)]
    times: dict[str, list[float]] = {"float32": []}
    arranged = {}
    for bits, name in ((1, "binary"), (2, "ternary")):
        codes = random_codes(STREAMED, STREAMED, bits)
        arranged[name] = (bits, *arrange_weight(codes, torch.rand(STREAMED, 1), bits))
        times[name] = []
    copies = {name: [weight.clone() for _ in range(layers)] for name, (_, weight, _) in arranged.items()}
    for _ in range(ROUNDS):
        times["float32"].append(time_once(lambda: [F.linear(x, weight) for weight in dense], threads) / len(dense))
        for name, (bits, _, scale) in arranged.items():
            calls = [packed_call(x, weight, scale, scale[0], bits, 8) for weight in copies[name]]
            times[name].append(time_once(partial(in_turn, calls), threads) / layers)
    medians = {name: statistics.median(values) for name, values in times.items()}
    shares = {name: copies[name][0].numel() / medians[name] / bandwidth for name in copies}
    print(f"1 token through {STREAMED} x {STREAMED} from memory: ", end="")
    print({name: f"{seconds * 1e6:.0f} us" for name, seconds in medians.items()}, "of the bandwidth:", shares)
    microseconds = {name: round(seconds * 1e6, 2) for name, seconds in medians.items()}
    return {"microseconds": microseconds, "bandwidth_share": shares}


def time_in_turn(calls: dict[str, Call], threads: int) -> dict[str, float]:
    """Return the median time of each call, in seconds."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(WINDOW / max(time_once(call, threads), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if times[name] and times[name][0] > LONGEST:
                continue
            call()
            times[name].append(time_once(partial(in_turn, [call] * counts[name]), threads) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def in_turn(calls: list[Call]) -> None:
    """Make all calls."""
    for call in calls:
        call()


def time_once(call: Call, threads: int) -> float:
    """Return how long a call takes, in seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    call()
    return clock() - begin


def random_codes(outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """Return codes as a weight might have them."""
    codes = torch.randint(0, bits + 1, (outputs, inputs))
    return (codes * 2 - 1 if bits == 1 else codes - 1).to(torch.int8)


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
