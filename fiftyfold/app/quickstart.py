"""``fiftyfold quickstart``: the whole road on an embedded task, in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fiftyfold.app.quickstart_task import vocabulary, write_task
from fiftyfold.app.recipe import Recipe
from fiftyfold.app.road import build_data, fine_tune, travel
from fiftyfold.app.summary import Row
from fiftyfold.app.training import claim_output, quiet_lightning, score
from fiftyfold.modules import FineTuningModule, quantize, reduce_layers
from fiftyfold.modules.structure import plain_state

TRAIN_ROWS = 8000
DEV_ROWS = 1000
TEACHER_EPOCHS = 3
TEACHER_LEARNING_RATE = 5e-4
STUDENT_EPOCHS = 4
STUDENT_LEARNING_RATE = 1e-3


def quickstart(*, output: str | None = None, seed: int = 42) -> None:
    """Try everything offline in minutes: make a task, train a teacher, compress it, reload it, compare.

    Args:
        output: folder to write; by default quickstart-1 (or the next free number) in the current directory.
        seed: seed of the generated task and of all training.
    """
    folder = _free_folder() if output is None else Path(output).expanduser()
    claim_output(folder)
    quiet_lightning()
    recipe = Recipe(
        teacher=str(folder / "teacher"),
        task="sst2",
        data=str(folder / "data"),
        layers="every-other",
        keep=3,
        epochs=STUDENT_EPOCHS,
        learning_rate=STUDENT_LEARNING_RATE,
        seed=seed,
    )
    print(f"1/3  writing {TRAIN_ROWS + DEV_ROWS} generated sentences to {recipe.data}")
    write_task(folder / "data", train_rows=TRAIN_ROWS, dev_rows=DEV_ROWS, seed=seed)
    print(f"2/3  training a teacher of 6 layers from nothing: {recipe.teacher}")
    rows = (_make_teacher(recipe), _cut_without_training(recipe))
    print("3/3  compressing it: 3 of the 6 layers, 1-bit weights, 8-bit activations, one-stage distillation")
    travel(recipe, folder / "student", extra_rows=rows)
    print(f"load it: import fiftyfold; model = fiftyfold.load({str(folder / 'student')!r})")


def _free_folder() -> Path:
    number = 1
    while Path(f"quickstart-{number}").exists():
        number += 1
    return Path(f"quickstart-{number}")


def _make_teacher(recipe: Recipe) -> Row:
    """Train the recipe's teacher in place, from random weights; return the row of those."""
    lightning.seed_everything(recipe.seed, verbose=False)
    folder, words = Path(recipe.teacher), vocabulary()
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
    untrained = Row("untrained", score(FineTuningModule(recipe.teacher), build_data(recipe))["val/score"])
    module = fine_tune(replace(recipe, epochs=TEACHER_EPOCHS, learning_rate=TEACHER_LEARNING_RATE), folder)
    module.model.save_pretrained(folder, state_dict=plain_state(module.model))
    return untrained


def _cut_without_training(recipe: Recipe) -> Row:
    """Score the teacher cut to the recipe's layers and bits with no training."""
    module = FineTuningModule(recipe.teacher)
    reduce_layers(module.model, recipe.layers, recipe.keep)
    quantize(module.model, weight_bits=recipe.weight_bits, activation_bits=recipe.activation_bits)
    return Row("cut, not trained", score(module, build_data(recipe))["val/score"])
