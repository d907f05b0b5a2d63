"""Time and memory of a linear layer's forward pass and training step in each form, next to dense and int8.

All forms of a size run in turn in every round; ratios are medians of the ratios round by round. Above 1 is slower than
the dense layer. ``saved`` are the bytes that autograd keeps between forward and backward.

    python benchmarks/tensor_network_speed.py
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fiftyfold.modules import quantize, tensorize
from fiftyfold.modules.packed.contents import pack_model
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer

SHAPE = (3072, 768)
TOKENS = (1, 16, 128, 1024)
ROUNDS, WARM_UP = 7, 2
RESULT = Path(__file__).parent / "results" / "tensor_network_speed.json"


def main() -> None:
    """Measure each number of tokens, print the ratios and write them."""
    rows = []
    for keep in (0.3, 0.05):
        for tokens in TOKENS:
            rows.append({"keep": keep, "tokens": tokens, **measure(keep, tokens)})
            print(rows[-1], flush=True)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    RESULT.write_text(json.dumps({**machine, "shape": SHAPE, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measure(keep: float, tokens: int) -> dict[str, Any]:
    """Return, for each form, times relative to the dense layer's, and what its training step keeps in memory."""
    x = torch.randn(tokens, SHAPE[1])
    layers = forms(keep)
    forward = interleaved({name: evaluation(layer, x) for name, layer in layers.items()})
    trained = {name: layer for name, layer in layers.items() if "int8" not in name and "materialized" not in name}
    training = interleaved({name: step(layer, x) for name, layer in trained.items()})
    saved = {name: round(saved_bytes(layer, x) / 2**20, 2) for name, layer in trained.items()}
    return {"forward": forward, "training step": training, "saved MiB": saved}


def forms(keep: float) -> dict[str, nn.Module]:
    """Return one layer in each form."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
    found: dict[str, nn.Module] = {"dense": dense}
    arguments: dict[str, dict[str, Any]] = {
        "low rank": {"cores": 2, "split": "low_rank"},
        "2 cores": {"cores": 2},
        "3 cores": {"cores": 3},
    }
    for name, how in arguments.items():
        found[name] = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
        found[name].load_state_dict(dense.state_dict())
        tensorize(found[name], keep=keep, **how)
    materialized = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
    tensorize(materialized, 2, keep=keep)
    layer = materialized[0]
    assert isinstance(layer, TensorNetworkLayer)
    layer.keeps_merged = True
    found["2 cores, materialized"] = materialized
    int8 = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
    quantize(int8, weight_bits=8, granularity="per_channel")
    pack_model(int8)
    found["int8"] = int8
    return found


def evaluation(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return a forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode():
            layer(x)

    return run


def step(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return a forward and a backward pass, the input's gradient included."""

    def run() -> None:
        layer.zero_grad()
        layer(x.clone().requires_grad_()).sum().backward()

    return run


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes of the tensors kept for the backward pass, parameters and the input left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    return sum(kept.values())


def interleaved(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median of each run's time over the dense one's, round by round."""
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for current in range(WARM_UP + ROUNDS):
        times = {}
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name] = time.perf_counter() - begin
        if current >= WARM_UP:
            for name, taken in times.items():
                ratios[name].append(taken / times["dense"])
    return {name: round(statistics.median(values), 2) for name, values in ratios.items()}


if __name__ == "__main__":
    main()
