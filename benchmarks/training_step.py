"""A quantization-aware training step against the plain float32 step: ratios, measured side by side in one process.

BERT's layers at random weights, without a teacher. Each round times one step of every kind in turn; the ratios are
medians over the rounds. Plain steps run with torch's default float32 product and with the faster one that torch has on
some processors (see fiftyfold/kernels/float_products.py), and quantized ones with both products behind them. For
example:

    python benchmarks/training_step.py --threads 1 --accumulate 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from fiftyfold.app.benchmark import processor_name
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.kernels.path import use_path
from fiftyfold.modules import quantize
from fiftyfold.modules.quantization.quantize import XTC_SETTINGS, QuantizeArguments

RESULTS = Path(__file__).parent / "results" / "training_step.json"
SHAPES = {1024: (8, 128), 128: (1, 128)}
WARM_UP = 1


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, choices=SHAPES)
    parser.add_argument("--accumulate", type=int, default=1, help="batches between two optimizer steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = measure(arguments)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    same = ("machine", "threads", "tokens", "accumulate", "layers", "hidden")
    kept = [old for old in kept if any(old[name] != row[name] for name in same)]
    RESULTS.write_text(json.dumps([*kept, row], indent=2) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of every kind in turn."""
    kinds: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {}
    steps: dict[str, Callable[[], None]] = {}
    plain = training_step(arguments, bits=None)
    quantized = {f"W{bits}A8": training_step(arguments, bits=bits) for bits in (1, 2)}
    for product in ("default", "faster"):
        steps[f"float32, {product}"] = plain
        kinds[f"float32, {product}"] = lambda product=product: product_and_path(product, "integer")  # type: ignore[misc]
        for name, step in quantized.items():
            for path in ("integer", "reference"):
                kind = f"{name}, {path} forward, {product}"
                steps[kind] = step
                kinds[kind] = lambda product=product, path=path: product_and_path(product, path)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for current in range(WARM_UP + arguments.rounds):
        for name, step in steps.items():
            with kinds[name]():
                begin = time.perf_counter()
                step()
                if current >= WARM_UP:
                    times[name].append(time.perf_counter() - begin)
    library = cpu_status().library
    return {
        "machine": processor_name(),
        "path": "torch" if library is None else library.path(),
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "accumulate": arguments.accumulate,
        "layers": arguments.layers,
        "hidden": arguments.hidden,
        "rounds": arguments.rounds,
        "float32 step, default product, ms": round(1000 * statistics.median(times["float32, default"]), 1),
        "ratios to the float32 step with the same product": {
            name: ratio(times, name, f"float32, {name.rpartition(', ')[2]}") for name in times if name[0] == "W"
        },
        "faster / default product": ratio(times, "float32, faster", "float32, default"),
    }


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """Return the median of the ratios round by round."""
    return round(statistics.median(a / b for a, b in zip(times[first], times[second], strict=True)), 3)


def training_step(arguments: argparse.Namespace, bits: int | None) -> Callable[[], None]:
    """Return one training step, of as many batches as are accumulated."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_attention_heads=arguments.hidden // 64,
    )
    model = BertForSequenceClassification(config).train()
    if bits:
        how: QuantizeArguments = {**XTC_SETTINGS, "weight_bits": bits}
        quantize(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = {"input_ids": torch.randint(1000, 30000, SHAPES[arguments.tokens])}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    batch |= {"labels": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(arguments.accumulate):
            model(**batch).loss.backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def product_and_path(product: str, path: Any) -> Iterator[None]:
    """Compute with one of torch's float32 products and one of the paths of quantized layers."""
    torch.set_float32_matmul_precision("medium" if product == "faster" else "highest")
    try:
        with use_path(path):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    main()
