"""``fiftyfold export``: from a training checkpoint to a folder that transformers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fiftyfold.app.remembered import read_checkpoint
from fiftyfold.app.training import claim_output
from fiftyfold.datamodules.glue import load_tokenizer
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.folder_replacement import replaced_folder
from fiftyfold.modules import DistillationModule, FineTuningModule, HealingModule, LanguageModelingModule
from fiftyfold.modules import export as export_folder
from fiftyfold.modules.layer_reduction import OPERATION as REDUCTION
from fiftyfold.modules.quantization.bitsandbytes_layers import quantize_bitsandbytes
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.structure import plain_state, structure_log
from fiftyfold.modules.task_module import DATA_KEY, TaskModule


def export(
    checkpoint: str,
    output: str,
    *,
    tokenizer: str | None = None,
    rest_dtype: Literal["float16", "float32"] = "float16",
    rest_bits: Literal[4, 8] | None = None,
    rest_targets: list[str] | str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    model: str | None = None,
) -> None:
    """Write the model of a training checkpoint as a packed folder, and verify it by reloading.

    A model that nothing quantized or tensorized becomes a plain folder of transformers, which can serve as a teacher.

    Args:
        checkpoint: a file that `fiftyfold fit` wrote.
        output: folder to write; must not hold anything.
        tokenizer: folder or hub id of the tokenizer; by default the teacher's.
        rest_dtype: precision of everything that is not quantized.
        rest_bits: hold dense linear layers that are left in 4 or 8 bits, by bitsandbytes.
        rest_targets: patterns of those layers' names; by default all of them.
        teacher: where the teacher is now, if it was moved since the training.
        student: the same for the folder that the student began from.
        model: the same for the folder that a fine-tuning began from.
    """
    target = Path(output).expanduser().resolve()
    claim_output(target)
    hyperparameters = _hyperparameters(Path(checkpoint))
    kind = _module_class(hyperparameters)
    moved = {"teacher": teacher, "student": student, "model": model}
    moved = {name: place for name, place in moved.items() if place is not None}
    if strange := sorted(moved.keys() - hyperparameters.keys()):
        raise FiftyfoldError(f"{checkpoint} was trained without a {strange[0]}; leave --{strange[0]} out.")
    try:
        trained = kind.load_from_checkpoint(checkpoint, map_location="cpu", **moved).trained_model
    except FiftyfoldError:
        raise
    except (RuntimeError, TypeError, KeyError) as error:
        raise FiftyfoldError(
            f"{checkpoint} does not fit {kind.__name__} ({first_line(error)}); name the folders that the training "
            "began from, as they were then."
        ) from error
    places = {**hyperparameters, **moved}
    words = _load_tokenizer(str(tokenizer or places.get("teacher") or places["model"]))
    if rest_bits is not None:
        quantize_bitsandbytes(trained, rest_bits, targets="." if rest_targets is None else rest_targets)
    if needs_plug_in(trained):
        report = export_folder(trained, target, tokenizer=words, rest_dtype=rest_dtype)
        print(json.dumps(report.to_json(), indent=2))
    else:
        with replaced_folder(target) as aside:
            trained.to(getattr(torch, rest_dtype)).save_pretrained(aside, state_dict=plain_state(trained))
            words.save_pretrained(aside)
        print(f"{output}: a plain folder of transformers in {rest_dtype}; no weight is quantized or tensorized")


def needs_plug_in(model: nn.Module) -> bool:
    """Tell whether a model's weights have another form than transformers expects."""
    changed = any(operation["op"] != REDUCTION for operation in structure_log(model))
    return changed or any(True for _ in quantized_layers(model))


def _module_class(hyperparameters: dict[str, Any]) -> type[TaskModule]:
    """Tell our modules apart by what only they take: language models have an objective, students a teacher."""
    if "objective" in hyperparameters:
        return HealingModule if "teacher" in hyperparameters else LanguageModelingModule
    return DistillationModule if "teacher" in hyperparameters else FineTuningModule


def _hyperparameters(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    found = content.get("hyper_parameters") if DATA_KEY in content else None
    if not isinstance(found, dict) or not isinstance(found.get("teacher", found.get("model")), str):
        raise FiftyfoldError(
            f"{path} is not a checkpoint of one of fiftyfold's modules; for another module, load it with "
            "fiftyfold.modules.load_from_checkpoint and call fiftyfold.export on its model."
        )
    return found


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer as training had it, with a padding token."""
    try:
        return load_tokenizer(source)
    except FiftyfoldError as error:
        raise FiftyfoldError(f"no tokenizer can be read from {source!r}; name one with --tokenizer.") from error
