"""What fusing would save of a packed encoder layer: query, key and value as one product, and GELU within its product.

Times of one BERT layer at random ternary weights and of its parts, in turn in each round; figures are medians. `qkv`
saves what three products take more than one that yields all three outputs, and quantizes their input once. `gelu`
saves what GELU takes more on the whole of its input than on pieces that are in cache, as they would be right after
their product. For example:

    python benchmarks/fused_layers.py --threads 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from fiftyfold.app.benchmark import processor_name
from fiftyfold.kernels.operators import arrange_weight, packed_linear
from fiftyfold.modules import quantize
from fiftyfold.modules.packed.contents import pack_layer, packed_entry
from fiftyfold.modules.quantization.layers import QuantizedLinear

RESULTS = Path(__file__).parent / "results" / "fused_layers.json"
HIDDEN = (384, 768)
SENTENCES = ((1, 1), (1, 16), (1, 128), (8, 128))
PIECE = 16384
ROUNDS = 15
WINDOW = 3e-3

Call = Callable[[], object]


def main() -> None:
    """Measure, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    cells = []
    with torch.inference_mode():
        for threads in parser.parse_args().threads:
            torch.set_num_threads(threads)
            cells += [measure_cell(hidden, *size, threads) for hidden in HIDDEN for size in SENTENCES]
    result = {"machine": processor_name(), "torch": torch.__version__, "cells": cells}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure_cell(hidden: int, sentences: int, length: int, threads: int) -> dict[str, object]:
    """Time a layer and its parts."""
    torch.manual_seed(0)
    x = torch.randn(sentences, length, hidden)
    wide = torch.randn(sentences, length, 4 * hidden)
    layer = packed_layer(hidden)
    calls: dict[str, Call] = {"layer": lambda: layer(x), "gelu": lambda: F.gelu(wide)}
    calls["gelu in pieces"] = partial(gelu_in_pieces, wide.view(-1).split(PIECE))
    calls |= products(x, hidden)
    times = time_in_turn(calls, threads)
    saved = {"qkv": times["three products"] - times["one product"], "gelu": times["gelu"] - times["gelu in pieces"]}
    shares = {name: round(seconds / times["layer"], 4) for name, seconds in saved.items()}
    microseconds = {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
    print(
        f"{threads} threads, {hidden}, {sentences} x {length}:", microseconds, "saved of the layer:", shares, flush=True
    )
    return {
        "threads": threads,
        "hidden": hidden,
        "sentences": sentences,
        "length": length,
        "microseconds": microseconds,
        "saved": shares,
    }


def packed_layer(hidden: int) -> nn.Module:
    """Return one encoder layer whose linear layers are packed."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )
    model = BertModel(config).eval()
    quantize(model, weight_bits=2)
    layer: nn.Module = model.encoder.layer[0]
    for name, module in list(layer.named_modules()):
        if isinstance(module, QuantizedLinear):
            layer.set_submodule(name, pack_layer(name, module, packed_entry(module)))
    return layer


def products(x: torch.Tensor, hidden: int) -> dict[str, Call]:
    """Return query, key and value as three products, and as one."""
    codes = [(torch.randint(0, 3, (hidden, hidden)) - 1).to(torch.int8) for _ in range(3)]
    biases = torch.randn(3, hidden)
    parts = [(*arrange_weight(part, torch.rand(hidden, 1), 2), bias) for part, bias in zip(codes, biases, strict=True)]
    whole = (*arrange_weight(torch.cat(codes), torch.rand(3 * hidden, 1), 2), biases.view(-1))
    return {
        "three products": lambda: [packed_linear(x, *part, bits=2) for part in parts],
        "one product": lambda: packed_linear(x, *whole, bits=2).split(hidden, -1),
    }


def gelu_in_pieces(pieces: tuple[torch.Tensor, ...]) -> None:
    """Compute as much GELU as all pieces take, on one that stays in cache."""
    for _ in pieces:
        F.gelu(pieces[0])


def time_in_turn(calls: dict[str, Call], threads: int) -> dict[str, float]:
    """Return the median time of each call, in seconds."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(WINDOW / max(time_calls(call, 1, threads), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            times[name].append(time_calls(call, counts[name], threads))
    return {name: statistics.median(values) for name, values in times.items()}


def time_calls(call: Call, count: int, threads: int) -> float:
    """Return how long a call takes, in seconds: of this thread's time where there is one, else of the clock's."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    for _ in range(count):
        call()
    return (clock() - begin) / count


if __name__ == "__main__":
    main()
