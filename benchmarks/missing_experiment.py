"""Tensor networks against plain low rank at equal bytes and with identical healing, on language models.

A cell is one model, one method, one budget and one seed; its result is a JSON file, and a cell that has one is skipped.
The budget is a share of the bytes that the block's matrices take in float16. Methods of the literature keep all numbers
of their factors; what fixes the gauge keeps fewer for the same rank, and so a larger rank for the same bytes. For
example:

    python benchmarks/missing_experiment.py --model stories --folder MODEL --data tinystories_sample.txt
    python benchmarks/missing_experiment.py --table
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_road import machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fiftyfold.app.training import quiet_lightning
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.modules import compress_matrices, heal, quantize, tensorize
from fiftyfold.modules.perplexity import TextScore, score_documents, score_row
from fiftyfold.modules.sizes import model_size
from fiftyfold.modules.structure import apply_operation
from fiftyfold.modules.tensor_network.decomposition import balanced
from fiftyfold.modules.tensor_network.form import NetworkForm, low_rank_form
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer, flat_numbers, matrix_of, matrix_shape
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import OPERATION, network_operation

RESULTS = Path(__file__).parent / "results" / "missing_experiment"
SHARES = (0.3, 0.5, 0.7)
SEEDS = (0, 1, 2)
DAMPING = 1e-4

Grams = Mapping[str, Tensor]
"""The mean of x·xᵀ over calibration tokens, by the name of the layer that reads x, float64."""


@dataclass(frozen=True)
class Budget:
    """What one model is given; the same for all methods."""

    sequence: int
    calibration_sequences: int = 64
    steps: int = 60
    block_steps: int = 30
    batch_size: int = 8
    learning_rate: float = 6e-3


BUDGETS = {"stories": Budget(sequence=128), "decoder": Budget(sequence=128, steps=40, block_steps=20)}
METHODS: dict[str, Callable[[PreTrainedModel, float, Grams], None]] = {
    "svd": lambda model, share, _: _tensorize(model, share, 2, "low_rank"),
    "whitened-svd": lambda model, share, grams: whitened_svd(model, share, grams, fixed=False),
    "mpo-2": lambda model, share, _: _tensorize(model, share, 2, "even"),
    "mpo-3": lambda model, share, _: _tensorize(model, share, 3, "even"),
    "whitened-svd-gauge": lambda model, share, grams: whitened_svd(model, share, grams, fixed=True),
}
OURS = "ours"
ALL_METHODS = (*METHODS, OURS)
EIGHT_BIT_SHARES = (0.266, 0.5)
PLAIN_BITS = {"int8": 8, "int4": 4}


def main() -> None:
    """Run the cells of one model that are missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUDGETS))
    parser.add_argument("--folder", help="the model's folder")
    parser.add_argument("--data", help="TinyStories' sample, or WikiText-2's folder")
    parser.add_argument("--cache", default=None, help="where tokens are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--only", help="run cells with this in their name")
    parser.add_argument("--most", type=int, default=10**9, help="run at most so many cells")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables())
        return
    quiet_lightning()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.model, arguments.folder, arguments.data, arguments.cache)
    done = 0
    for cell in cells(arguments.model, arguments.seeds):
        path = RESULTS / f"{cell.name}.json"
        if path.is_file() or (arguments.only and arguments.only not in cell.name):
            continue
        if done == arguments.most:
            return
        result = study.run(cell)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(cell.name, json.dumps(result["healed"]), f"{result['seconds']} s", flush=True)
        done += 1


@dataclass(frozen=True)
class Cell:
    """One compression: method, share of the matrices' float16 bytes, bits of the factors, seed."""

    model: str
    method: str
    share: float
    bits: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.model}-{self.method}-{self.bits}bit-{self.share:g}-{self.seed}"


def cells(model: str, seeds: list[int]) -> Iterator[Cell]:
    """Yield all cells of a model, the first seed's first, and the first table's before the second's."""
    for seed in seeds:
        yield Cell(model, "dense", 1.0, 16, seed) if seed == 0 else Cell(model, "dense", 1.0, 16, 0)
        for share, method in itertools.product(SHARES, ALL_METHODS):
            yield Cell(model, method, share, 16, seed)
    for seed in seeds:
        for name, bits in PLAIN_BITS.items():
            yield Cell(model, name, 1.0, bits, seed)
        for share, method in itertools.product(EIGHT_BIT_SHARES, ALL_METHODS):
            yield Cell(model, method, share, 8, seed)


class Study:
    """One model and its text: calibration and healing text apart from what is scored."""

    def __init__(self, name: str, folder: str, data: str, cache: str | None) -> None:
        self.name, self.budget = name, BUDGETS[name]
        self.teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        self.text = LanguageModelingDataModule(
            folder, data, sequence_length=self.budget.sequence, cache_dir=cache, limit_train=None
        )
        if name == "stories":
            documents = self.text.documents("train")
            # The first stories are easier than the others.
            self.scored = documents[1700::10]
            row = torch.cat([torch.cat([torch.tensor([1]), story]) for story in documents[100:1700]])
        else:
            self.scored = [self.text.row("test")[:25_000]]
            row = self.text.row("train")
        length = self.budget.sequence
        self.sequences = row[: len(row) // length * length].view(-1, length)
        self._grams: dict[int, Grams] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compress, score, heal, score."""
        begin = time.monotonic()
        torch.manual_seed(cell.seed)
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        matrices = find_matrices(student)
        if cell.method == OURS:
            batches = list(self.calibration(cell.seed).split(8))
            compress_matrices(student, batches, cell.share, factor_bits=cell.bits)
        else:
            compress(student, cell, self.grams(cell.seed) if cell.method.startswith("whitened") else {})
        result: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method,
            "share": cell.share,
            "bits": cell.bits,
            "seed": cell.seed,
            "matrix_bytes_share": matrix_bytes(student, matrices, cell) / matrix_bytes(self.teacher, matrices, None),
            "model_bytes": model_size(student).bytes,
            "compressed": self.score(student).to_json(),
        }
        if cell.method == "dense":
            result["healed"] = result["compressed"]
        else:
            generator = torch.Generator().manual_seed(1000 + cell.seed)
            chosen = torch.randperm(len(self.sequences), generator=generator)
            train_matrices_alone(student, matrices)
            losses = heal(
                student,
                self.teacher,
                self.sequences[chosen],
                steps=self.budget.steps,
                block_steps=self.budget.block_steps,
                batch_size=self.budget.batch_size,
                learning_rate=self.budget.learning_rate,
                seed=cell.seed,
            )
            result["healed"] = self.score(student).to_json()
            result["last_loss"] = statistics.fmean(losses[-10:])
        return result | {"seconds": round(time.monotonic() - begin), "budget": vars(self.budget), "machine": machine()}

    def grams(self, seed: int) -> Grams:
        """Return the activations' second moments of the original model on the seed's calibration text."""
        if seed not in self._grams:
            self._grams[seed] = activation_grams(self.teacher, self.calibration(seed))
        return self._grams[seed]

    def calibration(self, seed: int) -> Tensor:
        """Return the seed's calibration sequences."""
        generator = torch.Generator().manual_seed(2000 + seed)
        chosen = torch.randperm(len(self.sequences), generator=generator)[: self.budget.calibration_sequences]
        return self.sequences[chosen]

    def score(self, model: PreTrainedModel) -> TextScore:
        """Score the held-out text: a story on its own, or a row in windows of 256 that overlap by half."""
        if self.name == "stories":
            return score_documents(model, self.scored, first_token=1, window=512)
        return score_row(model, self.scored[0], window=256, stride=128)


def compress(student: PreTrainedModel, cell: Cell, grams: Grams) -> None:
    """Compress the matrices of the blocks as a cell says."""
    if cell.method == "dense":
        return
    matrices = find_matrices(student)
    if cell.method in PLAIN_BITS:
        grouped: dict[str, Any] = {"granularity": "per_channel"}
        targets = [f"^{name}$".replace(".", r"\.") for name in matrices]
        quantize(student, weight_bits=cell.bits, activation_bits=None, targets=targets, **grouped)
        return
    # Numbers of half the bytes: twice as many.
    METHODS[cell.method](student, cell.share * 16 / cell.bits, grams)
    if cell.bits == 8:
        targets = [f"^{name}$".replace(".", r"\.") for name in matrices]
        quantize(student, weight_bits=8, activation_bits=None, granularity="per_channel", targets=targets)


def whitened_svd(model: PreTrainedModel, share: float, grams: Grams, *, fixed: bool) -> None:
    """Replace the blocks' matrices by the products of thin matrices that are nearest in the activations' metric.

    SVD-LLM's objective, by the eigenvectors of the damped second moments instead of a Cholesky factor.

    Args:
        model: changed in place.
        share: numbers kept.
        grams: second moments of each matrix's input.
        fixed: count the numbers that a fixed gauge keeps, which affords a larger rank.
    """
    layers = dict(model.named_modules())
    forms: dict[str, NetworkForm] = {}
    numbers: dict[str, Tensor] = {}
    for name in find_matrices(model):
        shape = matrix_shape(layers[name])
        forms[name] = low_rank_form(shape, low_rank(shape, share, fixed=fixed))
        rank = forms[name].terms[0].bonds[0]
        weight, gram = matrix_of(layers[name]).double(), grams[name]
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0) + DAMPING * values.mean()
        root, inverse = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
        left, sizes, right = torch.linalg.svd(weight @ root, full_matrices=False)
        cores = [
            (left[:, :rank] * sizes[:rank]).view(1, shape[0], 1, rank),
            (right[:rank] @ inverse).view(rank, 1, shape[1], 1),
        ]
        numbers[name] = flat_numbers([balanced(cores)])
    apply_operation(model, network_operation(OPERATION, forms, 0))
    with torch.no_grad():
        for name, values in numbers.items():
            model.get_submodule(name).get_parameter("weight").copy_(values)


def low_rank(shape: tuple[int, int], share: float, *, fixed: bool) -> int:
    """Return the largest rank whose factors have at most a share of the matrix's numbers, at least 1."""
    rows, columns = shape
    rank = 1
    while rank < min(shape):
        following = rank + 1
        count = following * (rows + columns - (following if fixed else 0))
        # Each row of the identity block is named by two bytes: a number of float16.
        if count + (following if fixed else 0) > share * rows * columns:
            break
        rank = following
    return rank


@torch.no_grad()
def activation_grams(model: PreTrainedModel, sequences: Tensor) -> dict[str, Tensor]:
    """Return the mean of x·xᵀ over all tokens for the input x of each of the blocks' matrices."""
    layers = dict(model.named_modules())
    names = find_matrices(model)
    sums = {name: torch.zeros(2 * (matrix_shape(layers[name])[1],), dtype=torch.float64) for name in names}

    def add(name: str, given: tuple[Any, ...]) -> None:
        rows = given[0].reshape(-1, given[0].shape[-1]).double()
        sums[name] += rows.T @ rows

    hooks = [layers[name].register_forward_pre_hook(lambda _, given, name=name: add(name, given)) for name in names]
    for batch in sequences.split(8):
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / sequences.numel() for name, total in sums.items()}


def train_matrices_alone(model: nn.Module, matrices: list[str]) -> None:
    """Let only what stands for the blocks' matrices learn, so that all methods heal the same things."""
    model.requires_grad_(False)
    for name in matrices:
        model.get_submodule(name).weight.requires_grad_(True)


def matrix_bytes(model: nn.Module, matrices: list[str], cell: Cell | None) -> float:
    """Return what the blocks' matrices take: as the method's authors count, or with the gauge fixed for ours."""
    total = 0.0
    for name in matrices:
        layer = model.get_submodule(name)
        free = cell is not None and cell.bits == 16 and "gauge" not in cell.method and cell.method != OURS
        if free and isinstance(layer, TensorNetworkLayer):
            total += layer.form.count * 2
        else:
            total += model_size(layer).bytes
    return total


def tables() -> str:
    """Return both tables as Markdown; a cell that has not run is a dash."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    lines = []
    for model in BUDGETS:
        mine = [result for result in found if result["cell"].startswith(f"{model}-")]
        if not mine:
            continue
        for bits, shares in ((16, SHARES), (8, EIGHT_BIT_SHARES)):
            lines += ["", f"**{model}, factors in {bits} bits**", ""]
            heads = [f"{share:.0%} before" + " | " + f"{share:.0%} healed" for share in shares]
            lines += ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * (2 * len(shares))]
            for method in ALL_METHODS:
                entries = [_entry(mine, method, share, bits, phase) for share in shares for phase in _PHASES]
                lines.append(f"| {method} | " + " | ".join(entries) + " |")
        for method, bits in {"dense": 16, **PLAIN_BITS}.items():
            entries = [_entry(mine, method, 1.0, bits, phase) for phase in _PHASES]
            lines.append(f"\n{method}: {entries[0]} before, {entries[1]} healed")
    return "\n".join(lines)


_PHASES = ("compressed", "healed")


def _entry(results: list[dict[str, Any]], method: str, share: float, bits: int, phase: str) -> str:
    mine = [r for r in results if r["method"] == method and r["share"] == share and r["bits"] == bits]
    if not mine:
        return "-"
    nats = [result[phase]["nats"] for result in mine]
    accuracy = statistics.fmean(result[phase]["accuracy"] for result in mine)
    spread = f" ± {statistics.stdev(nats):.3f}" if len(nats) > 1 else ""
    return f"{statistics.fmean(nats):.3f}{spread} ({accuracy:.1%}, n={len(nats)})"


def _tensorize(model: PreTrainedModel, share: float, cores: int, split: Any) -> None:
    tensorize(model, cores=cores, split=split, keep=min(share, 0.999))


if __name__ == "__main__":
    main()
