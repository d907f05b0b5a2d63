"""Layers of 1 and 2 bits whose inputs are not quantized, by tables, against float32 and against building their weight.

Random weights: an output layer of 32,000 words, as language models have one tied to their embedding, and two square
layers. All kinds in turn in each round; ratios are medians over the rounds. For example:

    python benchmarks/table_linear.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
from table_product import time_in_turn
from torch import nn
from torch.nn import functional as F

from fiftyfold.app.benchmark import processor_name
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.kernels.path import use_path
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.quantization.layers import QuantizedLayer, activate
from fiftyfold.modules.quantization.settings import LayerSettings, WeightSettings

RESULTS = Path(__file__).parent / "results" / "table_linear.json"
SHAPES = ((512, 32000), (768, 768), (4096, 4096))
TOKENS = (1, 8, 64, 1024)
ROUNDS = 11


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    library = cpu_status().library
    if library is None:
        parser.error(f"there are no kernels here: {cpu_status().reason}")
    every = itertools.product((1, 2), (1, 2), SHAPES, TOKENS)
    with torch.inference_mode():
        cells = [measure_cell(tokens, *shape, bits, threads) for threads, bits, shape, tokens in every]
    result = {"machine": processor_name(), "torch": torch.__version__, "path": library.path(), "cells": cells}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_cell(tokens: int, inputs: int, outputs: int, bits: int, threads: int) -> dict[str, object]:
    """Time a packed layer, on both of its paths, and a dense one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs, bias=False)
    weight, x = dense.weight.detach().clone(), torch.randn(tokens, inputs)
    activate(dense, LayerSettings(WeightSettings(bits, "per_channel")))
    assert isinstance(dense, QuantizedLayer)
    packed = pack_layer("layer", dense, packed_entry(dense)).eval()

    def built() -> object:
        with use_path("reference"):
            return packed(x)

    times = time_in_turn({"float32": lambda: F.linear(x, weight), "tables": lambda: packed(x), "built": built}, ROUNDS)
    cell = {"threads": threads, "bits": bits, "tokens": tokens, "inputs": inputs, "outputs": outputs}
    milliseconds = {name: round(1000 * statistics.median(rounds), 3) for name, rounds in times.items()}
    gains = {
        name: round(statistics.median(a / b for a, b in zip(times[name], times["tables"], strict=True)), 2)
        for name in ("float32", "built")
    }
    print(cell, milliseconds, f"{gains['float32']} and {gains['built']} times as fast", flush=True)
    return {**cell, "milliseconds": milliseconds, "gain": gains}


if __name__ == "__main__":
    main()
