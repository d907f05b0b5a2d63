"""The real road: MiniLM fine-tuned on GLUE tasks, compressed to one and two bits.

Each cell is one training: a teacher, a student, or the baseline without distillation. A cell's result is a JSON file;
a cell that has one is skipped, and an interrupted one goes on where it stopped. For example:

    python benchmarks/real_road.py --model MINILM_FOLDER --data GLUE_FOLDER --work runs teacher-sst2 w1a8-sst2
    python benchmarks/real_road.py --model MINILM_FOLDER --data GLUE_FOLDER --work runs --list
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fiftyfold.app.recipe import Recipe
from fiftyfold.app.road import build_callbacks, build_data, compare, fine_tune, travel
from fiftyfold.app.training import quiet_lightning, score
from fiftyfold.datamodules.glue import load_tokenizer
from fiftyfold.datamodules.glue_files import read_file
from fiftyfold.datamodules.glue_tasks import get_task

RESULTS = Path(__file__).parent / "results" / "real_road"
SEED = 42


@dataclass(frozen=True)
class TaskBudget:
    """How long teacher and students of one task are trained, in epochs over ``rows`` training rows (None: all)."""

    teacher_epochs: int
    student_epochs: int
    rows: int | None = None


BUDGETS = {
    "sst2": TaskBudget(2, 3, 20_000),
    "mrpc": TaskBudget(4, 7),
    "rte": TaskBudget(5, 12),
    "stsb": TaskBudget(4, 8),
    "qnli": TaskBudget(3, 2),
}


@dataclass(frozen=True)
class MoreTexts:
    """Texts beside a task's training set, of which the students' teacher alone says what to make.

    Attributes:
        epochs: over the training set and all of these.
        sources: files in GLUE's folder, each with the task whose form it has; the first pairs of each.
        most: how many pairs of each file.
        dropout: of the student; None is the teacher's.
    """

    epochs: int
    sources: tuple[tuple[str, str], ...]
    most: int
    dropout: float | None = None


MORE_TEXTS = {
    "rte": MoreTexts(
        2, (("RTE/train.tsv", "rte"), ("RTE/test.tsv", "rte"), ("MNLI/train.tsv", "mnli")), 3_000, dropout=0.0
    ),
    "stsb": MoreTexts(
        2,
        (
            ("STS-B/test.tsv", "stsb"),
            ("MRPC/train.tsv", "mrpc"),
            ("MRPC/test.tsv", "mrpc"),
            ("QQP/train.tsv", "qqp"),
        ),
        8_000,
    ),
    "qnli": MoreTexts(2, (("QNLI/test.tsv", "qnli"),), 10_000, dropout=0.0),
}
"""RTE's own training set stands there once more, lest texts of another kind outnumber it by too much."""

TEACHER_LEARNING_RATE = 1e-4
STUDENT_LEARNING_RATE = 4e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "w1a8": {},
    "w2a8": {"weight_bits": 2},
    "w1a8-3layers": {"layers": "every-other", "keep": 3},
    "w1a8-xtc-targets": {"targets": "xtc"},
    "w1a8-fewer-tokens": {"vocabulary": "texts"},
    "w1a8-3layers-fewer-tokens": {"layers": "every-other", "keep": 3, "vocabulary": "texts"},
}
STUDIED = ("sst2", "mrpc")
CELLS = [
    *(f"teacher-{task}" for task in BUDGETS),
    *(f"w1a8-{task}" for task in BUDGETS),
    *(f"{variant}-{task}" for task in STUDIED for variant in VARIANTS if variant != "w1a8"),
    *(f"w1a8-no-distillation-{task}" for task in STUDIED),
    *(f"w1a8-more-texts-{task}" for task in MORE_TEXTS),
]


def main() -> None:
    """Run the cells that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the pre-trained model's folder")
    parser.add_argument("--data", help="GLUE's folder")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where models and checkpoints go")
    parser.add_argument(
        "--remeasure", action="store_true", help="score and time the students that are there once more, and stop"
    )
    parser.add_argument("--table", action="store_true", help="print the results as a Markdown table and stop")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("cells", nargs="*")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CELLS))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    quiet_lightning()
    if arguments.table:
        print(table())
        return
    if arguments.remeasure:
        remeasure(arguments.work)
        return
    for cell in arguments.cells or CELLS:
        path = RESULTS / f"{cell}.json"
        if not path.is_file():
            begin = time.monotonic()
            result = run_cell(cell, arguments.model, arguments.data, arguments.work)
            result |= {"cell": cell, "minutes": round((time.monotonic() - begin) / 60, 1), "machine": machine()}
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(cell, path.read_text(encoding="utf-8"))


def run_cell(cell: str, model: str, data: str, work: Path) -> dict[str, Any]:
    """Carry out one training and return what it came to."""
    variant, _, task = cell.rpartition("-")
    budget, teacher = BUDGETS[task], work / f"teacher-{task}"
    recipe = Recipe(
        teacher=str(teacher),
        task=task,
        data=data,
        epochs=budget.student_epochs,
        learning_rate=STUDENT_LEARNING_RATE,
        limit_train=budget.rows,
        group_by_length=True,
        matmul_precision="medium",
        seed=SEED,
    )
    if variant == "teacher":
        recipe = replace(recipe, teacher=model, epochs=budget.teacher_epochs, learning_rate=TEACHER_LEARNING_RATE)
        module = fine_tune(recipe, teacher)
        module.model.save_pretrained(teacher)
        AutoTokenizer.from_pretrained(model).save_pretrained(teacher)
        return {"recipe": recipe.to_json(), "scores": score(module, build_data(recipe))}
    if variant == "w1a8-no-distillation":
        module = fine_tune(recipe, work / cell, build_callbacks(recipe))
        return {"recipe": recipe.to_json(), "scores": score(module, build_data(recipe))}
    if variant == "w1a8-more-texts":
        texts = work / f"more-texts-{task}.jsonl"
        more = MORE_TEXTS[task]
        write_texts(more, task, Path(data), texts)
        recipe = replace(recipe, unlabelled=str(texts), epochs=more.epochs, dropout=more.dropout, checks_per_epoch=4)
    else:
        recipe = replace(recipe, **VARIANTS[variant])
    rows = travel(recipe, work / cell)
    return {"recipe": recipe.to_json(), "rows": [row.to_json() for row in rows]}


def write_texts(more: MoreTexts, task: str, data: Path, file: Path) -> None:
    """Write further texts in the task's form, as JSON lines."""
    columns = [names[0] for names in get_task(task).text_columns]
    with file.open("w", encoding="utf-8") as lines:
        for source, form in more.sources:
            pairs = zip(*read_file(data / source, get_task(form), labelled=None).texts, strict=True)
            for pair in itertools.islice(pairs, more.most):
                lines.write(json.dumps(dict(zip(columns, pair, strict=True)), ensure_ascii=False) + "\n")


def remeasure(work: Path) -> None:
    """Score and time every student whose folder is still there beside its teacher, on a machine that is idle."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in result and (work / result["cell"]).is_dir():
            recipe = Recipe(**result["recipe"])
            folder = work / result["cell"]
            rows, _ = compare(recipe, build_data(recipe, load_tokenizer(str(folder))), folder)
            result |= {"rows": [row.to_json() for row in rows], "latency_threads": torch.get_num_threads()}
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table() -> str:
    """Return the results as Markdown, one row a student."""
    lines = [
        "| task | student | score | teacher | kept | file | smaller | epochs |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in CELLS:
        path = RESULTS / f"{cell}.json"
        variant, _, task = cell.rpartition("-")
        if variant == "teacher" or not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in result:
            teacher, student = (result["rows"][place]["score"] for place in (0, -1))
        else:
            scores = json.loads((RESULTS / f"teacher-{task}.json").read_text(encoding="utf-8"))["scores"]
            teacher, student = scores["val/score"], result["scores"]["val/score"]
        size, ratio = "-", "-"
        if "rows" in result:
            own = result["rows"][-1]["bytes_on_disk"]
            size, ratio = f"{own / 2**20:.2f} MiB", f"{result['rows'][0]['bytes_on_disk'] / own:.1f}x"
        figures = (
            f"{student:.4f}",
            f"{teacher:.4f}",
            f"{student / teacher:.1%}",
            size,
            ratio,
            result["recipe"]["epochs"],
        )
        lines.append("| " + " | ".join(str(value) for value in (task, variant, *figures)) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describe where a cell ran."""
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main()
