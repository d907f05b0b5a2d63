"""Products by tables, which take gradients back through a layer, against the float32 products that they stand for.

Random rows and weights of BERT-base's shapes; both kinds in turn in each round, ratios are medians over the rounds. A
changed weight's entries are found anew after every optimizer step, so that is timed with the product. For example:

    python benchmarks/table_product.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fiftyfold.app.benchmark import processor_name
from fiftyfold.kernels import training
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.kernels.table_product import find_entries, multiply_rows

RESULTS = Path(__file__).parent / "results" / "table_product.json"
SHAPES = ((768, 768), (768, 3072), (3072, 768))
TOKENS = (32, 128, 1024)
ROUNDS = 15


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    library = cpu_status().library
    if library is None:
        parser.error(f"there are no kernels here: {cpu_status().reason}")
    every = itertools.product((1, 2), (1, 2), SHAPES, TOKENS)
    cells = [measure_cell(tokens, *shape, bits, threads) for threads, bits, shape, tokens in every]
    result = {"machine": processor_name(), "torch": torch.__version__, "path": library.path(), "cells": cells}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_cell(tokens: int, inputs: int, outputs: int, bits: int, threads: int) -> dict[str, object]:
    """Time both products."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight, rows = torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    quantized = training.quantize_weight(weight, bits=bits, groups=1, per_tensor=False, clip=None)

    def by_tables() -> object:
        return multiply_rows(rows, find_entries(quantized.codes, bits), quantized.scale, bits, inputs)

    times = time_in_turn({"float32": lambda: rows @ weight, "tables": by_tables})
    gain = statistics.median(a / b for a, b in zip(times["float32"], times["tables"], strict=True))
    cell = {"threads": threads, "bits": bits, "tokens": tokens, "inputs": inputs, "outputs": outputs}
    milliseconds = {name: round(1000 * statistics.median(rounds), 3) for name, rounds in times.items()}
    print(cell, milliseconds, f"{gain:.2f} times as fast", flush=True)
    return {**cell, "milliseconds": milliseconds, "gain": round(gain, 2)}


def time_in_turn(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; the second of two calls counts, whose memory is warm."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    main()
