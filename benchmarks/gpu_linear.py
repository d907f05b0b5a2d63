"""The packed linear layer on an NVIDIA GPU: beside cuBLAS in bfloat16 and bitsandbytes' nf4, and a training step.

Every figure is the median over CUDA graphs' replays, all candidates in turn, with weights that no cache holds: each
candidate has as many copies of its weight as fill 256 MiB, used in rotation. For example:

    python benchmarks/gpu_linear.py
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fiftyfold.kernels.operators import arrange_weight, packed_linear
from fiftyfold.modules import quantize

RESULTS = Path(__file__).parent / "results" / "gpu_linear.json"
SHAPES = ((4096, 4096), (11008, 4096))
"""Outputs and inputs."""

TOKENS = (1, 16, 128, 1024)
ROUNDS = 25
CACHE_BYTES = 256 * 2**20
COPIED_BYTES = 2**30


def main() -> None:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here; this benchmark needs one.")
    bandwidth = memory_bandwidth()
    rows = [measure(outputs, inputs, tokens, bandwidth) for outputs, inputs in SHAPES for tokens in TOKENS]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy bandwidth, GB/s": round(bandwidth / 1e9),
        "linear": rows,
        "training step / bfloat16 step": training_step(),
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def measure(outputs: int, inputs: int, tokens: int, bandwidth: float) -> dict[str, Any]:
    """Time the candidates for one shape, and check that they compute the same."""
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    candidates: dict[str, tuple[Callable[[Any], torch.Tensor], list[Any], int]] = {}
    dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    candidates["bfloat16"] = (lambda weight: F.linear(x, weight), copies(dense), dense.nbytes)
    for bits, name in ((1, "binary"), (2, "ternary")):
        drawn = torch.randint(0 if bits == 1 else -1, 2, (outputs, inputs), device="cuda")
        codes = (drawn * 2 - 1 if bits == 1 else drawn).to(torch.int8)
        weight, scale = arrange_weight(codes, torch.full((1, 1), 0.02, device="cuda"), bits)
        candidates[name] = (
            functools.partial(packed_product, x, scale, bits),
            copies(weight),
            weight.nbytes,
        )
        check(x, codes, weight, scale, bits)
    if (nf4 := nf4_weight(dense)) is not None:
        candidates["nf4"] = (lambda weight: nf4_product(x, weight), [nf4() for _ in range(8)], outputs * inputs // 2)
    times = time_in_turn({name: (function, pool) for name, (function, pool, _) in candidates.items()})
    row: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "tokens": tokens}
    row["microseconds"] = {name: round(1e6 * time, 2) for name, time in times.items()}
    row["times bfloat16"] = {name: round(times["bfloat16"] / time, 2) for name, time in times.items()}
    row["share of memory bandwidth"] = {
        name: round(size / times[name] / bandwidth, 3) for name, (_, _, size) in candidates.items()
    }
    return row


def packed_product(x: torch.Tensor, scale: torch.Tensor, bits: int, weight: torch.Tensor) -> torch.Tensor:
    """Return the product with a packed weight."""
    return packed_linear(x, weight, scale, bits=bits)


def check(x: torch.Tensor, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """Compare with the product of the same integers by torch, bit for bit."""
    expected = packed_linear(x, codes, scale, bits=bits)
    if not torch.equal(packed_linear(x, weight, scale, bits=bits), expected):
        raise SystemExit(f"the Triton kernel's bits differ from plain torch's at {len(x)} tokens.")


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return as many copies as no cache holds."""
    return [weight.clone() for _ in range(max(1, CACHE_BYTES // weight.nbytes))]


def nf4_weight(dense: torch.Tensor) -> Callable[[], Any] | None:
    """Return what makes a weight in bitsandbytes' nf4, or nothing where that is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    return lambda: bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4")


def nf4_product(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """Return the product with such a weight."""
    import bitsandbytes

    packed, state = weight
    product: torch.Tensor = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    return product


def time_in_turn(candidates: dict[str, tuple[Callable[[Any], torch.Tensor], list[Any]]]) -> dict[str, float]:
    """Return the median seconds of a call, each candidate captured as one CUDA graph over all its weights."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, (function, pool) in candidates.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for weight in pool:
                function(weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in pool:
                function(weight)
        graphs[name] = (graph, len(pool))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for current in range(ROUNDS + 3):
        for name, (graph, calls) in graphs.items():
            seconds = elapsed(graph.replay) / calls
            if current >= 3:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def elapsed(function: Callable[[], object]) -> float:
    """Return the seconds that the GPU takes for ``function``."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def memory_bandwidth() -> float:
    """Return the bytes a second of a large copy, those read and those written."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(ROUNDS))


def training_step() -> dict[str, float]:
    """Return the ratios of a quantization-aware step of a feed-forward block to one without, under autocast."""

    def step_of(bits: int | None) -> Callable[[], None]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4096, 11008), nn.GELU(), nn.Linear(11008, 4096)).cuda()
        if bits:
            quantize(block, weight_bits=bits)
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-5, fused=True)
        x = torch.randn(2048, 4096, device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                block(x).float().square().mean().backward()
            optimizer.step()

        return step

    steps = {"bfloat16": step_of(None), "W1A8": step_of(1), "W2A8": step_of(2)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for current in range(ROUNDS + 3):
        for name, step in steps.items():
            seconds = elapsed(step)
            if current >= 3:
                times[name].append(seconds)
    base = statistics.median(times.pop("bfloat16"))
    return {name: round(statistics.median(found) / base, 3) for name, found in times.items()}


if __name__ == "__main__":
    main()
