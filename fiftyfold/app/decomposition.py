"""The first half of ``fiftyfold tensorize``: a language model's matrices become tensor networks."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fiftyfold.app.progress import shown
from fiftyfold.app.tensorize_recipe import TensorizeRecipe
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules import compress_matrices, export, tensorize
from fiftyfold.modules.quantization.bitsandbytes_layers import dense_linears
from fiftyfold.modules.tensor_network.compressed_matrix import WHOLE_BITS

DECOMPOSED = "decomposed"
"""Folder, below the work folder, of the model as it is before it is healed."""

MATRICES = "matrices"
"""Folder, below the work folder, of the matrices that are compressed already, while others are not."""

CALIBRATION_TOKENS = 65_536
"""Tokens of the training text on which the outputs of layers are compared."""


def decompose(recipe: TensorizeRecipe, teacher: PreTrainedModel, text: LanguageModelingDataModule, work: Path) -> None:
    """Write the decomposed model into the work folder, unless it is there; one that is killed goes on there.

    Args:
        recipe: how.
        teacher: unchanged afterwards.
        text: to calibrate on.
        work: the work folder.

    Raises:
        FiftyfoldError: if something does not fit.
    """
    if not (work / DECOMPOSED).is_dir():
        _write(recipe, teacher, text, work)
    shutil.rmtree(work / MATRICES, ignore_errors=True)


def _write(recipe: TensorizeRecipe, teacher: PreTrainedModel, text: LanguageModelingDataModule, work: Path) -> None:
    student = copy.deepcopy(teacher)
    with shown("Matrices") as report:
        if recipe.method == "activations":
            arguments: dict[str, Any] = {"allocation": recipe.allocation}
            if recipe.core_bits is not None:
                arguments |= {"factor_bits": recipe.core_bits, "whole_bits": WHOLE_BITS}
            compress_matrices(
                student,
                _calibration(text),
                recipe.keep,
                exclude=recipe.exclude,
                report=report,
                work_folder=work / MATRICES,
                **arguments,
            )
        else:
            tensorize(
                student,
                recipe.cores,
                keep=recipe.keep,
                split=recipe.split,
                exclude=recipe.exclude,
                report=report,
                work_folder=work / MATRICES,
            )
    if recipe.rest_bits is not None and not dense_linears(student):
        raise FiftyfoldError("tensor networks leave no dense linear layer: leave rest_bits out, or exclude layers.")
    export(student, work / DECOMPOSED, tokenizer=text.tokenizer, rest_dtype="float32")


def _calibration(text: LanguageModelingDataModule) -> list[dict[str, torch.Tensor]]:
    """Return the first batches of the training text, as far as the calibration's tokens go."""
    most = max(1, CALIBRATION_TOKENS // (text.batch_size * text.sequence_length))
    return [{"input_ids": batch["input_ids"]} for batch in itertools.islice(text.train_dataloader(), most)]
