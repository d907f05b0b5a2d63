"""What it costs that a model may change while it trains, and how often a resume was compared.

Four parts, each by name or all of them:

    python -m benchmarks.reliability_cost operations checkpoints scaling resumes

``operations``: milliseconds of each operation in a run at BERT-base's size, beside a training step of the same run.
``checkpoints``: bytes by which a checkpoint of BERT-base grows.
``scaling``: examples a second of two processes under DDP as a multiple of one's, one thread each.
``resumes``: every case of the tests' table, resumed after every step on one process, and on two ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from transformers import BertConfig, BertForSequenceClassification

from fiftyfold.callbacks import (
    LayerPruning,
    LayerReduction,
    QuantizationAwareTraining,
    TensorNetworkDecomposition,
)
from fiftyfold.callbacks.operation_callback import OperationCallback
from fiftyfold.modules.surgery import parameter_checksum
from tests.cases import CASES
from tests.ranks import RANKS, run_on_ranks
from tests.strangers import MODULES, STEPS, OddUser, assert_same_training, make_trainer

RESULTS = Path(__file__).parent / "results" / "reliability_cost.json"
BATCH, TOKENS = 4, 32
SCALING_ROUNDS = 3


def main() -> None:
    """Measure the parts that are asked for, and write them beside those that were measured before."""
    parts = {"operations": operations, "checkpoints": checkpoints, "scaling": scaling, "resumes": resumes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; all by default")
    torch.set_num_threads(1)
    for name in parser.parse_args().parts or parts:
        if name not in parts:
            parser.error(f"there is no part {name!r}")
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        kept[name] = parts[name]()
        print(json.dumps({name: kept[name]}, indent=2))
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


class Bert(LightningModule):
    """BERT of random weights, trained on random tokens."""

    def __init__(self, batch: int = BATCH, **sizes: int) -> None:
        super().__init__()
        self.batch = batch
        torch.manual_seed(0)
        self.model = BertForSequenceClassification(BertConfig(**sizes))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Return the loss of one batch of tokens."""
        labels = torch.zeros(len(batch), dtype=torch.long)
        return self.model(input_ids=batch, labels=labels).loss  # type: ignore[no-any-return]

    def train_dataloader(self) -> torch.utils.data.DataLoader[torch.Tensor]:
        """Return as many batches as anybody wants."""
        tokens = torch.randint(1000, 30000, (1024, TOKENS), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens, batch_size=self.batch)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for everything."""
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class Stopwatch(Callback):
    """Times every step, and every operation."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.operations: list[float] = []

    def watch(self, callback: OperationCallback) -> OperationCallback:
        """Time what ``callback`` carries out."""
        carry_out = callback._carry_out

        def timed(*arguments: Any) -> None:
            begin = time.perf_counter()
            carry_out(*arguments)
            self.operations.append(time.perf_counter() - begin)

        callback._carry_out = timed  # type: ignore[method-assign,assignment]
        return callback

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin after the operations of this step."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End after the optimizer."""
        self.steps.append(time.perf_counter() - self._begin)


def trainer(callbacks: list[Callback], steps: int, **options: Any) -> Trainer:
    """Return a Trainer that does nothing else."""
    return Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[], OperationCallback]] = {
    "quantize 76 layers to 1 bit": lambda: QuantizationAwareTraining(1, start=2),
    "reduce 12 layers to 6": lambda: LayerReduction(start=2),
    "prune 12 layers to 11": lambda: LayerPruning({2: 1}, measure_steps=1),
    "decompose 72 layers, 3 cores of bond 64": lambda: TensorNetworkDecomposition(3, 64, start=2),
}


def operations() -> list[dict[str, Any]]:
    """Time every operation on one process and on two ranks, where DDP wraps the model again."""

    def run(make: Callable[[], OperationCallback], **options: Any) -> tuple[list[float], list[float]]:
        watch = Stopwatch()
        trainer([watch.watch(make()), watch], 3, **options).fit(Bert())
        return watch.operations, watch.steps

    rows = []
    for name, make in OPERATIONS.items():
        single = run(make)
        ranks = run_on_ranks(lambda make=make: run(make, strategy="ddp", devices=RANKS))
        for kind, (times, steps) in (("one process", single), ("two ranks, DDP", ranks[0])):
            # The first step of a process allocates, and the operation stands before the third.
            rows.append(
                {
                    "operation": name,
                    "on": kind,
                    "milliseconds": round(1000 * times[0], 1),
                    "training_steps": round(times[0] / steps[1], 3),
                }
            )
    return rows


def checkpoints() -> list[dict[str, Any]]:
    """Save BERT-base with and without the log and the names of the optimizer's parameters."""
    rows = []
    for weights_only in (True, False):
        sizes = {}
        for name, callbacks in {
            "plain": lambda: [],
            "quantized": lambda: [QuantizationAwareTraining(1)],
        }.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "saved.ckpt"
                running = trainer(callbacks(), 1)
                running.fit(Bert())
                running.save_checkpoint(path, weights_only=weights_only)
                sizes[name] = path.stat().st_size
        rows.append({"weights_only": weights_only, **sizes, "growth": sizes["quantized"] - sizes["plain"]})
    return rows


MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
TINYBERT = {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200}
SCALING: dict[str, dict[str, Any]] = {
    "MiniLM's size, 32 sentences": {"model": MINILM, "batch": 32, "accumulate": 1},
    "MiniLM's size, 4 times 32 sentences a step": {"model": MINILM, "batch": 32, "accumulate": 4},
    "TinyBERT's size, 4 sentences": {"model": TINYBERT, "batch": BATCH, "accumulate": 1},
}


class Pace(Callback):
    """Times whole optimizer steps, and all that lies between them, after the first ``skip`` batches."""

    def __init__(self, skip: int) -> None:
        self._skip = skip

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Begin after the warm-up."""
        if batch_idx == self._skip:
            self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ARG002
        """The last one counts."""
        self.seconds = time.perf_counter() - self._begin if hasattr(self, "_begin") else 0.0


def scaling() -> list[dict[str, Any]]:
    """Compare what one process trains in a second with what two do, in turn; one thread and one batch a process."""

    def seconds(setting: dict[str, Any], **options: Any) -> float:
        accumulate = setting["accumulate"]
        pace = Pace(skip=max(2, accumulate))
        batches = max(2, accumulate) + (4 if setting["batch"] > BATCH else 24)
        callbacks = [QuantizationAwareTraining(1), pace]
        running = trainer(callbacks, -1, max_epochs=1, limit_train_batches=batches,
                          accumulate_grad_batches=accumulate, **options)  # fmt: skip
        running.fit(Bert(batch=setting["batch"], **setting["model"]))
        return pace.seconds

    ratios: dict[str, list[float]] = {name: [] for name in SCALING}
    for _ in range(SCALING_ROUNDS):
        for name, setting in SCALING.items():
            # Both in processes of their own, so that only their number differs.
            one = run_on_ranks(seconds, setting, ranks=1)[0]
            two = max(run_on_ranks(lambda setting=setting: seconds(setting, strategy="ddp", devices=RANKS)))
            ratios[name].append(RANKS * one / two)
    return [
        {
            "setting": name,
            **setting,
            "tokens": TOKENS,
            "times_one_process": round(statistics.median(ratios[name]), 3),
            "rounds": [round(ratio, 3) for ratio in ratios[name]],
        }
        for name, setting in SCALING.items()
    ]


class CompareRanks(Callback):
    """Compares the ranks' parameters after every step."""

    def __init__(self) -> None:
        self.compared = 0
        self.equal = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Gather one checksum a rank."""
        sums = trainer.strategy.all_gather(parameter_checksum(pl_module))
        self.compared += 1
        self.equal += int(bool((sums == sums[0]).all()))


def resumes() -> dict[str, Any]:
    """Count the resume points whose end equals that of the undisturbed run bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        single = [
            _resume_everywhere(case, kind, [], Path(folder) / f"{case}, {kind.__name__}")
            for case in CASES
            for kind in MODULES
        ]

        def on_ranks() -> list[tuple[int, int, int, int]]:
            rows = []
            for case in CASES:
                compare, where = CompareRanks(), Path(folder) / f"{case}, ranks"
                counts = _resume_everywhere(case, OddUser, [compare], where, strategy="ddp", devices=RANKS)
                rows.append((*counts, compare.compared, compare.equal))
            return rows

        ranks = run_on_ranks(on_ranks)
    compared, _, steps, equal = (sum(column) for column in zip(*ranks[0], strict=True))
    identical = min(sum(row[1] for row in rank) for rank in ranks)
    return {
        "one process": {"compared": sum(row[0] for row in single), "identical": sum(row[1] for row in single)},
        "two ranks": {"compared": compared, "identical": identical},
        "ranks after a step": {"compared": steps, "identical": equal},
    }


def _resume_everywhere(
    case: Any, kind: Any, callbacks: list[Callback], folder: Path, **options: Any
) -> tuple[int, int]:
    """Return the number of resume points, and of those that end as the whole run."""
    options = {"use_distributed_sampler": False, **options}
    whole = make_trainer([*case.callbacks(), *callbacks], folder, **options)
    whole.fit(kind(seed=0))
    identical = 0
    for step in range(1, STEPS):
        resumed = make_trainer([*case.callbacks(), *callbacks], **options)
        resumed.fit(kind(seed=1), ckpt_path=folder / f"step={step}.ckpt")
        try:
            assert_same_training(whole, resumed, "")
            identical += 1
        except AssertionError as difference:
            print(f"{case}, {kind.__name__}, from step {step}: {difference}")
    return STEPS - 1, identical


if __name__ == "__main__":
    main()
