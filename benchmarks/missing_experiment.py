"""Tensor networks against plain low rank at equal bytes and with identical healing.

A cell is one model, one method, one budget and one seed; its result is a JSON file, and a cell that has one is skipped.
The budget is a share of the bytes that the block's matrices take in float16. Methods of the literature keep all numbers
of their factors; what fixes the gauge keeps fewer for the same rank, and so a larger rank for the same bytes. Models:
``stories`` (stories260K on TinyStories), ``decoder`` (train_decoder.py's on WikiText-2) and ``minilm`` (MiniLM-L6
fine-tuned on STS-B, as ``real_road.py teacher-stsb`` makes it). For example:

    python benchmarks/missing_experiment.py --model stories --folder MODEL --data tinystories_sample.txt
    python benchmarks/missing_experiment.py --model minilm --folder runs/teacher-stsb --data GLUE_FOLDER
    python benchmarks/missing_experiment.py --table
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_road import machine
from rivals import METHODS, PLAIN_BITS, Grams, activation_grams, compress, quantize_numbers
from studied_models import ClassifierBudget, Place, StudiedClassifier, StudiedLanguageModel, StudiedModel, TextBudget
from torch import nn
from transformers import PreTrainedModel

from fiftyfold.app.training import quiet_lightning
from fiftyfold.modules import compress_matrices
from fiftyfold.modules.sizes import model_size
from fiftyfold.modules.tensor_network.layers import TensorNetworkLayer
from fiftyfold.modules.tensor_network.targets import find_matrices

RESULTS = Path(__file__).parent / "results" / "missing_experiment"
SHARES = (0.3, 0.5, 0.7)
EIGHT_BIT_SHARES = (0.266, 0.5)
SEEDS = (0, 1, 2)
OURS = "ours"
WHOLE_BITS = (3, 4, 8)
"""In which ours may keep a matrix whole, in the second table."""
ALL_METHODS = (*METHODS, OURS)
FIGURES = {"stories": ("nats", "accuracy"), "decoder": ("nats", "accuracy"), "minilm": ("pearson", "spearman")}
"""What the tables show of each model's scores: the first with its spread, the second in brackets."""

MODELS: dict[str, Callable[[Place], StudiedModel]] = {
    "stories": lambda place: StudiedLanguageModel(place, TextBudget(), stories=True),
    "decoder": lambda place: StudiedLanguageModel(place, TextBudget(steps=40, block_steps=20), stories=False),
    "minilm": lambda place: StudiedClassifier(place, ClassifierBudget()),
}


def main() -> None:
    """Run the cells of one model that are missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--folder", help="the model's folder")
    parser.add_argument("--data", help="TinyStories' sample, WikiText-2's folder, or GLUE's")
    parser.add_argument("--cache", default=None, help="where tokens are kept")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="what computes")
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
    place = Place(arguments.folder, arguments.data, arguments.cache, arguments.device)
    study = Study(MODELS[arguments.model](place), arguments.device)
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
    """Compresses, heals and scores one model in every way."""

    def __init__(self, model: StudiedModel, device: str) -> None:
        self.model, self.device = model, device
        self._grams: dict[int, Grams] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compress, score, heal, score."""
        begin = time.monotonic()
        torch.manual_seed(cell.seed)
        teacher, student = self.model.teacher, copy.deepcopy(self.model.teacher).requires_grad_(True)
        matrices = find_matrices(student)
        if cell.method == OURS:
            how: dict[str, Any] = {"factor_bits": 8, "whole_bits": WHOLE_BITS} if cell.bits == 8 else {}
            if cell.model == "stories" and cell.bits == 16:
                how["allocation"] = "outputs"  # as docs/tensor_networks.md advises for a model so small
            compress_matrices(student, self.model.calibration(cell.seed), cell.share, **how)
        else:
            grams = self.grams(cell.seed) if cell.method.startswith("whitened") else {}
            compress(student, cell.method, cell.share, cell.bits, grams)
            if cell.method in PLAIN_BITS:
                quantize_numbers(student, cell.method, cell.bits)
        stored = stored_form(student, cell)
        result: dict[str, Any] = {
            "cell": cell.name,
            "method": cell.method,
            "share": cell.share,
            "bits": cell.bits,
            "seed": cell.seed,
            "matrix_bytes_share": matrix_bytes(stored, matrices, cell) / matrix_bytes(teacher, matrices, None),
            "model_bytes": model_size(stored).bytes,
            "compressed": self.model.score(stored),
        }
        if cell.method == "dense":
            result["healed"] = result["compressed"]
        else:
            train_matrices_alone(student, matrices)
            healed, result["learning_rate"], result["losses"] = self.heal(student, cell)
            result["healed"] = self.model.score(stored_form(healed, cell))
        seconds = round(time.monotonic() - begin)
        return result | {"seconds": seconds, "budget": self.model.budget, "machine": self.machine()}

    def machine(self) -> dict[str, Any]:
        """Say what computed."""
        gpu = {"gpu": torch.cuda.get_device_name()} if self.device != "cpu" else {}
        return machine() | gpu

    def heal(self, student: PreTrainedModel, cell: Cell) -> tuple[PreTrainedModel, float, dict[float, float]]:
        """Heal at each learning rate, for one that mends a bad start spoils a good one.

        Returns:
            The best of the students, the one that was not healed among them; its rate, zero for none; and the losses
            that decided, by rate, on text of their own.
        """
        students = {0.0: student}
        rates = [*self.model.budget["learning_rates"], *(self.model.budget["low_bit_rates"] if cell.bits < 16 else ())]
        for rate in rates:
            students[rate] = copy.deepcopy(student)
            self.model.heal(students[rate], cell.seed, rate)
        losses = {rate: self.model.loss(stored_form(each, cell), cell.seed) for rate, each in students.items()}
        best = min(losses, key=losses.__getitem__)
        return students[best], best, losses

    def grams(self, seed: int) -> Grams:
        """Return the activations' second moments of the original model on the seed's calibration text."""
        if seed not in self._grams:
            self._grams[seed] = activation_grams(self.model.teacher, self.model.calibration(seed))
        return self._grams[seed]


def stored_form(student: PreTrainedModel, cell: Cell) -> PreTrainedModel:
    """Return what a file would hold: factors of the literature's methods heal in full and are quantized after it.

    That is better for them: whitened SVD at 26.6 % heals to 2.45 nats so, and to 2.53 under its quantizers. Ours and
    whole matrices heal under theirs.
    """
    if cell.bits == 16 or cell.method not in METHODS:
        return student
    stored = copy.deepcopy(student)
    quantize_numbers(stored, cell.method, cell.bits)
    return stored


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
            bias = getattr(layer, "bias", None)
            total += 2 * (layer.form.count + (0 if bias is None else bias.numel()))
        else:
            total += model_size(layer).bytes
    return total


def tables() -> str:
    """Return both tables as Markdown; a cell that has not run is a dash."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    lines = []
    for model in MODELS:
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
    first, second = FIGURES[mine[0]["cell"].partition("-")[0]]
    values = [result[phase][first] for result in mine]
    aside = statistics.fmean(result[phase][second] for result in mine)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({aside:.1%}, n={len(values)})"


if __name__ == "__main__":
    main()
