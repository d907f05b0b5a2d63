"""The XTC road: a teacher goes in, a packed folder and one table come out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from fiftyfold.app.delivered import complete_delivery, read_rows
from fiftyfold.app.latency import measure_latency
from fiftyfold.app.recipe import Recipe
from fiftyfold.app.summary import Row, draw_picture, print_table
from fiftyfold.app.training import CONTENT, claim_output, quiet_lightning, score, train, work_folder
from fiftyfold.callbacks import QuantizationAwareTraining
from fiftyfold.datamodules import GLUEDataModule
from fiftyfold.file_replacement import sync
from fiftyfold.kernels.float_products import use_fast_float_products
from fiftyfold.modules import DistillationModule, FineTuningModule, export, load
from fiftyfold.modules.digest import digest_of, identity_of
from fiftyfold.modules.evaluation_task import fit_labels, fit_vocabulary
from fiftyfold.modules.fine_tuning import load_teacher
from fiftyfold.modules.packed.contents import round_rest
from fiftyfold.modules.packed.export import REPORT_FILE
from fiftyfold.modules.quantization.targets import find_targets
from fiftyfold.modules.task_module import TaskModule
from fiftyfold.modules.vocabulary import trim_vocabulary

PICTURE_FILE = "fiftyfold_report.png"


def travel(recipe: Recipe, folder: Path, extra_rows: Sequence[Row] = ()) -> list[Row]:
    """Distil, quantize, export, reload, measure and print.

    An interrupted run keeps its checkpoints beside ``folder``; the same recipe goes on from there.

    Args:
        recipe: what to do.
        folder: where the compressed model goes; must not hold anything.
        extra_rows: rows to show between the teacher's and the student's.

    Returns:
        The rows of the table.

    Raises:
        FiftyfoldError: if something does not fit; nothing is overwritten.
    """
    work = _work_folder(folder)
    if complete_delivery(folder, work, recipe.to_json()):
        rows, metric = read_rows(folder)
        show(rows, metric, folder)
        return rows
    claim_output(folder)
    quiet_lightning()
    data, teacher = _prepare(recipe), recipe.teacher
    if recipe.vocabulary is not None:
        data, teacher = trim(recipe, data)
    module = build_module(recipe, teacher)
    check_input(recipe, module, data)
    with _trained(recipe, module, data, folder, build_callbacks(recipe)) as work:
        if not isinstance(teacher, str):
            extra_rows = [*extra_rows, _row_of_trimmed(teacher, data)]
        return deliver(recipe, module, data, aside=work / "packed", folder=folder, extra_rows=extra_rows)


def fine_tune(recipe: Recipe, folder: Path, callbacks: tuple[Callback, ...] = ()) -> FineTuningModule:
    """Train on the labels alone: to make a teacher, or a baseline without distillation.

    Args:
        recipe: what to do; its ``teacher`` is the model to begin from.
        folder: the run keeps its checkpoints beside it.
        callbacks: compression callbacks.

    Returns:
        The module, with the weights of the best development score.
    """
    data = _prepare(recipe)
    module = FineTuningModule(
        recipe.teacher, num_labels=data.num_labels, optimizer=_optimizer(recipe), warmup=recipe.warmup
    )
    with _trained(recipe, module, data, folder, callbacks):
        pass
    return module


def trim(recipe: Recipe, data: GLUEDataModule) -> tuple[GLUEDataModule, PreTrainedModel]:
    """Return the recipe's data and teacher with the tokens that its training texts need."""
    teacher = load_teacher(recipe.teacher)
    fit_vocabulary(teacher.config, data.tokenizer, "teacher")
    with Console().status("finding the tokens that the texts need"):
        tokenizer = trim_vocabulary(teacher, data.tokenizer, data.training_texts)
    print(f"vocabulary: {len(tokenizer):,} of {len(data.tokenizer):,} tokens")
    return build_data(recipe, tokenizer), teacher


def build_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> GLUEDataModule:
    """Return the recipe's data, in the tokens of ``tokenizer`` or of its teacher."""
    return GLUEDataModule(
        task=recipe.task,
        data=recipe.data,
        tokenizer=tokenizer or recipe.teacher,
        batch_size=recipe.batch_size,
        max_length=recipe.max_length,
        group_by_length=recipe.group_by_length,
        limit_train=recipe.limit_train,
        augmented=recipe.augmented,
        unlabelled=recipe.unlabelled,
        seed=recipe.seed,
    )


def build_module(recipe: Recipe, teacher: str | PreTrainedModel) -> DistillationModule:
    """Return a teacher and the recipe's student."""
    return DistillationModule(
        teacher=teacher,
        layers=recipe.layers,
        keep=recipe.keep,
        stages=recipe.stages,
        warmup=recipe.warmup,
        dropout=recipe.dropout,
        optimizer=_optimizer(recipe),
    )


def build_callbacks(recipe: Recipe) -> tuple[QuantizationAwareTraining]:
    """Return the recipe's compression callbacks."""
    return (
        QuantizationAwareTraining(
            weight_bits=recipe.weight_bits, activation_bits=recipe.activation_bits, targets=recipe.targets
        ),
    )


def check_input(recipe: Recipe, module: DistillationModule, data: GLUEDataModule) -> None:
    """Read the data and compare all that must fit, before anything takes long.

    Raises:
        FiftyfoldError: if something does not fit.
    """
    fit_labels(module.teacher.config, data.task, "teacher")
    fit_vocabulary(module.teacher.config, data.tokenizer, "teacher")
    find_targets(module.student, recipe.targets)
    data.setup("fit")


def deliver(
    recipe: Recipe,
    module: DistillationModule,
    data: GLUEDataModule,
    *,
    aside: Path,
    folder: Path,
    extra_rows: Sequence[Row],
) -> list[Row]:
    """Export a trained student and show what came of it beside its teacher.

    Args:
        recipe: what was done.
        module: the trained module.
        data: its data.
        aside: where the folder is made; it becomes ``folder`` when it is complete, the measurements included.
        folder: where it goes.
        extra_rows: rows to show between the teacher's and the student's.
    """
    # What goes to disk is what is scored: rounded first, the trained model and the reloaded one have equal weights.
    round_rest(module.student)
    report = {"recipe": recipe.to_json(), "trained": score(module, data)}
    export(module.student, aside, tokenizer=data.tokenizer, report=report, overwrite=True)
    rows, scores = compare(recipe, data, aside)
    rows[1:1] = extra_rows
    metric = data.task.selection_metric
    put_in_place(aside, folder, rows, metric=metric, scores=scores)
    show(rows, metric, folder)
    return rows


def put_in_place(
    aside: Path, folder: Path, rows: Sequence[Row], *, metric: str, scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Give an exported folder its measurements and its picture, and its name when the disk holds all of it.

    Args:
        aside: the folder, on the same file system as its place.
        folder: its place.
        rows: of its table.
        metric: the rows' score.
        scores: all metrics, by the name of what was measured.
    """
    path = aside / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8"))
    report |= {"metric": metric, "scores": scores, "rows": [row.to_json() for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_picture(rows, metric=metric, title=folder.name, path=aside / PICTURE_FILE)
    for path in [*aside.iterdir(), aside]:
        sync(path)
    aside.rename(folder)
    sync(folder.parent)


def compare(recipe: Recipe, data: GLUEDataModule, folder: Path) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Score and time a delivered folder beside its teacher.

    Returns:
        The rows of teacher and student, and all their development metrics by name.
    """
    teacher, student = FineTuningModule(recipe.teacher), FineTuningModule(load(folder))
    read = data if recipe.vocabulary is None else build_data(recipe)  # in the teacher's own tokens
    scores = {"teacher": score(teacher, read), "reloaded": score(student, data)}
    latency = measure_latency({"teacher": teacher.model, "student": student.model}, first_batch(data))
    rows = [
        Row(
            "teacher",
            scores["teacher"]["val/score"],
            weights_bytes(recipe.teacher),
            sum(parameter.numel() for parameter in teacher.model.parameters()),
            latency["teacher"],
        ),
        Row(
            f"student {recipe.bits_name}",
            scores["reloaded"]["val/score"],
            weights_bytes(str(folder)),
            json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["parameters"],
            latency["student"],
        ),
    ]
    return rows, scores


def _row_of_trimmed(teacher: PreTrainedModel, data: GLUEDataModule) -> Row:
    numbers = sum(parameter.numel() for parameter in teacher.parameters())
    return Row("fewer tokens", score(FineTuningModule(teacher), data)["val/score"], parameters=numbers)


def show(rows: Sequence[Row], metric: str, folder: Path) -> None:
    """Print the table of a delivered folder."""
    print_table(rows, metric=metric, title=str(folder))
    Console().print(f"picture: {folder / PICTURE_FILE}", highlight=False, soft_wrap=True)


def first_batch(data: GLUEDataModule) -> dict[str, torch.Tensor]:
    """Return one development batch."""
    loaders = data.val_dataloader()
    loader = loaders[0] if isinstance(loaders, list) else loaders
    return dict(next(iter(loader)))


def weights_bytes(source: str) -> int:
    """Return the bytes on disk of a transformers model's weights, of a folder or of the hub's local copy."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(cached_file(source, "config.json")).parent
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def _prepare(recipe: Recipe) -> GLUEDataModule:
    """Seed this process and build the data, in this order."""
    lightning.seed_everything(recipe.seed, verbose=False)
    use_fast_float_products(recipe.matmul_precision)
    return build_data(recipe)


@contextmanager
def _trained(
    recipe: Recipe, module: TaskModule, data: GLUEDataModule, folder: Path, callbacks: tuple[Callback, ...]
) -> Iterator[Path]:
    """Train ``module`` beside ``folder``, and keep the work folder until the block has ended well."""
    work = _work_folder(folder)
    models = [module, module.teacher] if isinstance(module, DistillationModule) else [module]
    content = {"models": digest_of([identity_of(model) for model in models]), "data": data.source_digests()}
    with work_folder(work, recipe.to_json() | {CONTENT: content}) as resume_from:
        train(
            module,
            data,
            epochs=recipe.epochs,
            work=work,
            callbacks=callbacks,
            checks_per_epoch=recipe.checks_per_epoch,
            resume_from=resume_from,
        )
        torch.set_float32_matmul_precision("highest")
        yield work


def _work_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".work")


def _optimizer(recipe: Recipe) -> Callable[[Any], torch.optim.Optimizer]:
    # On a CPU the fused AdamW takes a quarter of the time of the default one.
    return lambda parameters: torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)
