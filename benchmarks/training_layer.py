"""One quantized linear layer in training, in integers and by fake quantization: where the integers pay.

Forward and backward pass of a layer at random weights, float32, for sizes from tiny to BERT's. Each round times all
kinds in turn; figures are medians over the rounds, in time that the thread computed. `step` has a changed weight each
time, as after every optimizer step; `batch` has the same weight, as for batches that are accumulated. For example:

    python benchmarks/training_layer.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fiftyfold.app.benchmark import processor_name
from fiftyfold.kernels.path import Path as Arithmetic
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.quantization import integer_forward
from fiftyfold.modules.quantization.layers import activate
from fiftyfold.modules.quantization.settings import ActivationSettings, LayerSettings, WeightSettings

RESULTS = Path(__file__).parent / "results" / "training_layer.json"
SHAPES = ((16, 16), (64, 64), (128, 128), (256, 256), (384, 384), (768, 768), (768, 3072), (3072, 768))
TOKENS = (1, 8, 32, 128, 1024)
ROUNDS = 9
WINDOW = 3e-3


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    integer_forward.SMALLEST_WEIGHT = 0
    cells = [measure_cell(tokens, *shape, bits) for bits in (1, 2) for shape in SHAPES for tokens in TOKENS]
    result = {"machine": processor_name(), "torch": torch.__version__, "threads": 1, "cells": cells}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_cell(tokens: int, inputs: int, outputs: int, bits: int) -> dict[str, object]:
    """Time the passes of a dense layer and of a quantized one."""
    torch.manual_seed(0)
    x, gradient = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    dense, quantized = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
    activate(quantized, LayerSettings(WeightSettings(bits), ActivationSettings()))
    calls = {"float32": passes(dense, x, gradient, "integer", changes=False)}
    for path in ("integer", "reference"):
        calls[f"{path}, step"] = passes(quantized, x, gradient, path, changes=True)
        calls[f"{path}, batch"] = passes(quantized, x, gradient, path, changes=False)
    times = time_in_turn(calls)
    ratios = {kind: times[f"integer, {kind}"] / times[f"reference, {kind}"] for kind in ("step", "batch")}
    print(f"{bits} bit, {tokens:5} tokens, {inputs:4} -> {outputs:4}:", end=" ")
    print({name: round(seconds * 1e6) for name, seconds in times.items()}, end=" ")
    print("integer / reference", {kind: round(value, 2) for kind, value in ratios.items()}, flush=True)
    microseconds = {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
    return {"bits": bits, "tokens": tokens, "inputs": inputs, "outputs": outputs, "microseconds": microseconds}


def passes(
    layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, path: Arithmetic, *, changes: bool
) -> Callable[[], None]:
    """Return a call of one forward and one backward pass."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)

    def call() -> None:
        if changes:
            weight.data[0, 0].neg_()
        with use_path(path):
            layer(x).backward(gradient)
        x.grad = weight.grad = None

    return call


def time_in_turn(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median time of each call, in seconds."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(WINDOW / max(time_calls(call, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(time_calls(call, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def time_calls(call: Callable[[], None], count: int) -> float:
    """Return how long a call takes, in seconds."""
    begin = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - begin) / count


if __name__ == "__main__":
    main()
