"""``fiftyfold quickstart``: the whole road on an embedded task, in minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fiftyfold.app.quickstart_task import vocabulary, write_task
from fiftyfold.app.recipe import Recipe
from fiftyfold.app.road import build_data, travel
from fiftyfold.app.summary import Row
from fiftyfold.app.training import quiet_lightning, score, train
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import FineTuningModule, quantize

TRAIN_ROWS = 8000
DEV_ROWS = 1000
TEACHER_EPOCHS = 8
STUDENT_EPOCHS = 8


def quickstart(output: str | None = None, *, seed: int = 42) -> None:
    """Try everything offline in minutes: make a task, train a teacher, compress it, reload it, compare.

    Args:
        output: folder to write; by default quickstart-1 (or the next free number) in the current directory.
        seed: seed of the generated task and of all training.
    """
    folder = _free_folder() if output is None else Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise FiftyfoldError(f"{folder} already holds something; name another folder, or move that one away.")
    quiet_lightning()
    data, teacher = folder / "data", folder / "teacher"
    print(f"1/4  writing {TRAIN_ROWS + DEV_ROWS} generated sentences to {data}")
    write_task(data, train_rows=TRAIN_ROWS, dev_rows=DEV_ROWS, seed=seed)
    print("2/4  training a teacher")
    untrained = _train_teacher(teacher, str(data), seed, folder / "teacher.work")
    recipe = Recipe(
        teacher=str(teacher),
        task="sst2",
        data=str(data),
        layers="every-other",
        keep=3,
        epochs=STUDENT_EPOCHS,
        learning_rate=1e-3,
        seed=seed,
    )
    rows = (untrained, _cut_without_training(recipe))
    print("3/4  compressing it: 3 of 6 layers, 1-bit weights, 8-bit activations, one-stage distillation")
    travel(recipe, folder / "student", extra_rows=rows)
    print(f"4/4  done; load it with: fiftyfold.load({str(folder / 'student')!r})")


def _free_folder() -> Path:
    number = 1
    while Path(f"quickstart-{number}").exists():
        number += 1
    return Path(f"quickstart-{number}")


def _train_teacher(folder: Path, data_folder: str, seed: int, work: Path) -> Row:
    """Write a trained teacher to ``folder``; return the row of the untrained one."""
    lightning.seed_everything(seed, verbose=False)
    words = vocabulary()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    vocabulary_file = folder / "vocab.txt"
    vocabulary_file.write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(vocabulary_file), model_max_length=64).save_pretrained(folder)
    data = build_data(Recipe(teacher=str(folder), task="sst2", data=data_folder, seed=seed))
    module = FineTuningModule(
        str(folder), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, fused=True)
    )
    untrained = Row("untrained", score(module, data)["val/score"])
    train(module, data, epochs=TEACHER_EPOCHS, work=work)
    module.model.save_pretrained(folder)
    shutil.rmtree(work, ignore_errors=True)
    return untrained


def _cut_without_training(recipe: Recipe) -> Row:
    """Score the teacher's weights cut to the recipe's bits with no training."""
    module = FineTuningModule(recipe.teacher)
    quantize(module.model, weight_bits=recipe.weight_bits, activation_bits=recipe.activation_bits)
    return Row(f"teacher cut to {recipe.bits_name}", score(module, build_data(recipe))["val/score"])
