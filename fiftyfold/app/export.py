"""``fiftyfold export``: from a training checkpoint to a packed folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import DistillationModule, FineTuningModule
from fiftyfold.modules import export as export_folder
from fiftyfold.modules.task_module import TaskModule


def export(
    checkpoint: str,
    output: str,
    *,
    tokenizer: str | None = None,
    rest_dtype: Literal["float16", "float32"] = "float16",
) -> None:
    """Write the model of a training checkpoint as a packed folder, and verify it by reloading.

    Args:
        checkpoint: a file that `fiftyfold fit` wrote.
        output: folder to write; must not hold anything.
        tokenizer: folder or hub id of the tokenizer; by default the teacher's.
        rest_dtype: precision of everything that is not quantized.
    """
    hyperparameters = _hyperparameters(Path(checkpoint))
    kind: type[TaskModule] = DistillationModule if "teacher" in hyperparameters else FineTuningModule
    module = kind.load_from_checkpoint(checkpoint, map_location="cpu")
    source = tokenizer or hyperparameters.get("teacher") or hyperparameters.get("model")
    report = export_folder(module.trained_model, output, tokenizer=_load_tokenizer(str(source)), rest_dtype=rest_dtype)
    print(json.dumps(report.to_json(), indent=2))


def _hyperparameters(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FiftyfoldError(f"there is no checkpoint at {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise FiftyfoldError(f"{path} is not a checkpoint that can be read safely ({_first_line(error)}).") from error
    found = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not {"teacher", "model"} & found.keys():
        raise FiftyfoldError(
            f"{path} is not a checkpoint of DistillationModule or FineTuningModule; for another module, load it with "
            "fiftyfold.modules.load_from_checkpoint and call fiftyfold.export on its model."
        )
    return found


def _load_tokenizer(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FiftyfoldError(f"no tokenizer can be read from {source!r}; name one with --tokenizer.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
