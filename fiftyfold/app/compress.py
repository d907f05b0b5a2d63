"""``fiftyfold compress``: the whole XTC road in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fiftyfold.app.recipe import Recipe
from fiftyfold.app.road import travel
from fiftyfold.errors import FiftyfoldError


def compress(
    teacher: str,
    *,
    task: str,
    output: str | None = None,
    data: str | None = None,
    weight_bits: Literal[1, 2, 3, 4, 8] = 1,
    activation_bits: Literal[4, 8] | None = 8,
    layers: Literal["all", "every-other", "first", "last"] | list[int] = "all",
    keep: int | None = None,
    targets: str | list[str] = "default",
    vocabulary: Literal["all", "texts"] = "all",
    stages: Literal[1, 2, 3] = 1,
    epochs: int = 6,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    dropout: float | None = None,
    max_length: int | None = None,
    group_by_length: bool = False,
    limit_train: int | None = None,
    augmented: str | None = None,
    unlabelled: str | None = None,
    checks_per_epoch: int = 1,
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    seed: int = 42,
) -> None:
    """Compress a fine-tuned model: distil, train low bits, export, reload, and print one table.

    Ctrl-C or a crash loses little: the same command goes on where the run stopped.

    Args:
        teacher: the fine-tuned model, a folder or a hub id.
        task: GLUE task whose form the data have: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli.
        output: folder for the compressed model; by default the teacher's name with the task and bits appended.
        data: folder with the task's files (TSV, CSV, JSON lines or parquet); the hub's GLUE if left out.
        weight_bits: 1 is binary, 2 ternary.
        activation_bits: bits of the inputs of linear layers; null leaves them in floating point.
        layers: which of the teacher's layers the student keeps.
        keep: how many layers to keep, with every-other, first or last; by default half of them.
        targets: modules to quantize: default, xtc, or regular expressions on their names.
        vocabulary: texts leaves out the tokens that no training text has, unlabelled ones included; other words are
            then read in smaller pieces.
        stages: stages of distillation; XTC uses one.
        epochs: passes over the training data.
        batch_size: sentences a step.
        learning_rate: peak of the linear warm-up and decay.
        warmup: share of the training over which the learning rate rises.
        dropout: of the student while it trains; by default the teacher's.
        max_length: longest input in tokens; by default 64 for single sentences, 128 for pairs.
        group_by_length: put sentences of like length into one batch, which pads less and trains quicker.
        limit_train: use only so many training rows, drawn with the seed.
        augmented: a file that `fiftyfold augment` wrote, to train on in place of the training split.
        unlabelled: a file with more texts of the task's form, to train on beside the training split; the teacher
            shows what to make of them, and labels in it are not read.
        checks_per_epoch: how often an epoch scores the development set, to keep the best weights.
        matmul_precision: torch's setting for float32 products while training; medium is quicker, and on processors
            with bfloat16 matrix units less precise.
        seed: seed of data order and dropout.
    """
    recipe = Recipe(
        teacher=teacher,
        task=task,
        data=data,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        layers=layers,
        keep=keep,
        targets=targets,
        vocabulary=None if vocabulary == "all" else vocabulary,
        stages=stages,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        dropout=dropout,
        max_length=max_length,
        group_by_length=group_by_length,
        limit_train=limit_train,
        augmented=augmented,
        unlabelled=unlabelled,
        checks_per_epoch=checks_per_epoch,
        matmul_precision=matmul_precision,
        seed=seed,
    )
    folder = output or f"{Path(teacher).resolve().name}-{task}-{recipe.bits_name.lower()}"
    place = Path(folder).expanduser()
    if place.resolve() == Path.cwd():
        raise FiftyfoldError(
            "the output replaces its folder, which cannot be the current directory; name one inside it."
        )
    travel(recipe, place)
