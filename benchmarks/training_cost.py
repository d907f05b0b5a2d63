"""What quantization-aware training and its teacher cost: ratios of training steps, measured side by side.

Each round times one step of every kind in turn: student alone in full precision, under one-stage distillation in full
precision, and under distillation with quantizers. The ratios are medians over the rounds. For example:

    python benchmarks/training_cost.py --model FINE_TUNED_MINILM --tokens 64 --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForSequenceClassification

from fiftyfold.modules import DistillationModule, quantize
from fiftyfold.modules.quantization.quantize import XTC_SETTINGS, QuantizeArguments

RESULTS = Path(__file__).parent / "results" / "training_cost.json"
BATCH = 32
ROUNDS = 15
WARM_UP = 3


def main() -> None:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fine-tuned classifier")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(arguments.model, tokens) | {"threads": arguments.threads} for tokens in arguments.tokens]
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    kept = [row for row in kept if (row["tokens"], row["threads"]) not in {(r["tokens"], r["threads"]) for r in rows}]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*kept, *rows], indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


def measure(folder: str, tokens: int) -> dict[str, Any]:
    """Time the steps for one length of input."""
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1000, 30000, (BATCH, tokens)), "labels": torch.zeros(BATCH, dtype=torch.long)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    steps = {
        "plain": plain_step(folder, batch, bits=None),
        "plain, W1A8": plain_step(folder, batch, bits=1),
        "plain, W2A8": plain_step(folder, batch, bits=2),
        "distilled": distillation_step(folder, batch, bits=None),
        "distilled, W1A8": distillation_step(folder, batch, bits=1),
        "distilled, W2A8": distillation_step(folder, batch, bits=2),
        "teacher": teacher_step(folder, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for current in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if current >= WARM_UP:
                times[name].append(time.perf_counter() - begin)
    return {
        "tokens": tokens,
        "batch": BATCH,
        "rounds": ROUNDS,
        "W1A8 / full precision, no teacher": ratio(times, "plain, W1A8", "plain"),
        "W2A8 / full precision, no teacher": ratio(times, "plain, W2A8", "plain"),
        "W1A8 / full precision, distilled": ratio(times, "distilled, W1A8", "distilled"),
        "W2A8 / full precision, distilled": ratio(times, "distilled, W2A8", "distilled"),
        "teacher's forward / distilled W1A8 step": ratio(times, "teacher", "distilled, W1A8"),
    }


def ratio(times: dict[str, list[float]], first: str, second: str) -> float:
    """Return the median of the ratios round by round."""
    return round(statistics.median(a / b for a, b in zip(times[first], times[second], strict=True)), 3)


def xtc_settings(bits: int) -> QuantizeArguments:
    """Return XTC's arguments of ``quantize`` for a bit width."""
    return {**XTC_SETTINGS, "weight_bits": bits}


def plain_step(folder: str, batch: dict[str, torch.Tensor], bits: int | None) -> Callable[[], None]:
    """Return one training step on the labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    if bits:
        quantize(model, **xtc_settings(bits))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def distillation_step(folder: str, batch: dict[str, torch.Tensor], bits: int | None) -> Callable[[], None]:
    """Return one training step under one-stage distillation."""
    module: LightningModule = DistillationModule(folder)
    module.trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    if bits:
        quantize(module.student, **xtc_settings(bits))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module.training_losses(batch)["loss"].backward()
        optimizer.step()

    return step


def teacher_step(folder: str, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return the teacher's forward pass as distillation runs it."""
    module: Any = DistillationModule(folder)
    layers = module._teacher.num_layers

    def step() -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        module._teacher(inputs, hidden=list(range(layers + 1)), attention=list(range(layers)))

    return step


if __name__ == "__main__":
    main()
