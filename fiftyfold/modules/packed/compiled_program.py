"""Programs that were compiled ahead of time, and calling them."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_NAME

import fiftyfold.kernels.operators  # noqa: F401 - a program may call them
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.kernels.backends import backend_for
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.modules.packed.program_facts import ProgramFacts, processor_instructions, read_facts

LARGEST_ERROR = 0.05
"""Of the outputs' length. Compiled norms round otherwise than torch's, and 8-bit inputs near a tie then take another
code, which moved the outputs of a binary BERT-base by 0.017 and of a MiniLM by 0.006."""

OUTPUT_PACKAGE = "transformers"
"""Where the classes of outputs that a program may return come from."""

_KEPT_OUTPUTS = 64


class CompiledModel(nn.Module):
    """A program that :func:`.compile_model` wrote, called as the model itself is. Threads take turns.

    Args:
        program: torch's loaded package.
        facts: what its file says.
    """

    def __init__(self, program: Any, facts: ProgramFacts) -> None:
        super().__init__()
        self._program, self.facts = program, facts
        # torch holds Python's lock while a call waits for the program to be free, and an operator that is written in
        # Python needs it: two threads would wait for each other for good.
        self._turn = threading.Lock()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> Any:
        """Return what the model returns, transformers' output with logits or hidden states.

        Args:
            input_ids: (sentences, tokens), integers.
            attention_mask: the same shape, 0 where there is padding; by default there is none.
            token_type_ids: the same shape, for models that have such; by default all 0.

        Raises:
            FiftyfoldError: if the shapes or numbers do not fit the model.
        """
        self._check_shapes(input_ids, attention_mask, token_type_ids)
        _check_numbers("input_ids", input_ids, self.facts.words)
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask != 0,
        }
        if token_type_ids is not None:
            _check_numbers("token_type_ids", token_type_ids, max(self.facts.types, 1))
        if "token_type_ids" in self.facts.inputs:
            given["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        # The program reads memory as it was laid out when it was traced.
        given = {name: tensor.to(self.facts.device, torch.int64).contiguous() for name, tensor in given.items()}
        with self._turn:
            return self._program(**given)

    def _check_shapes(self, input_ids: torch.Tensor, *others: torch.Tensor | None) -> None:
        facts, shape = self.facts, input_ids.shape
        if input_ids.dim() != 2 or not input_ids.numel():
            raise FiftyfoldError(f"input_ids must be (sentences, tokens), not of shape {tuple(shape)}.")
        if strange := [other for other in others if other is not None and other.shape != shape]:
            raise FiftyfoldError(f"an input of shape {tuple(strange[0].shape)} does not go with {tuple(shape)} tokens.")
        if facts.longest is not None and shape[1] > facts.longest:
            raise FiftyfoldError(f"{facts.model} takes at most {facts.longest} tokens, not {shape[1]}.")


def load_compiled(file: str | os.PathLike[str]) -> CompiledModel:
    """Load a program that :func:`.compile_model` wrote, and try it.

    It is machine code: load only what you compiled yourself.

    Raises:
        FiftyfoldError: if the file is absent, corrupt, not one of ours, or was compiled for another kind of machine.
    """
    path = Path(file).expanduser()
    compiled = open_program(path)
    facts = compiled.facts
    try:
        outputs = first_numbers(compiled(torch.tensor(facts.sample)))
    except RuntimeError as error:  # of another torch, or of an operator that is missing
        raise FiftyfoldError(
            f"{path} {_does_not_run(facts)} ({first_line(error)}); compile the model again."
        ) from error
    if not are_close(outputs, torch.tensor(facts.outputs)):
        raise FiftyfoldError(f"{path} does not compute here what its model did; compile the model again.")
    return compiled


def open_program(path: Path) -> CompiledModel:
    """Load a program without trying it.

    Raises:
        FiftyfoldError: as :func:`load_compiled`.
    """
    if path.is_dir():
        kind = "of a model" if (path / CONFIG_NAME).is_file() else "and no compiled program"
        raise FiftyfoldError(
            f"{path} is a folder {kind}; open an exported one by fiftyfold.load, or compile it first, by fiftyfold "
            "compile."
        )
    facts = read_facts(path)
    if missing := sorted(set(facts.instructions) - set(processor_instructions())):
        raise FiftyfoldError(
            f"{path} was compiled on a processor that has {', '.join(missing[:3])}, which this one has not; compile "
            "the model here."
        )
    backend_for(facts.device)
    if facts.library and cpu_status().library is None:
        raise FiftyfoldError(
            f"{path} calls the kernels for CPUs, which are missing here ({cpu_status().reason}): install g++, or a "
            "wheel of fiftyfold for this platform."
        )
    try:
        # torch knows an output's class once its module is imported.
        if facts.output_module.split(".")[0] == OUTPUT_PACKAGE:
            importlib.import_module(facts.output_module)
        program = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # whatever torch's loader makes of it
        raise FiftyfoldError(
            f"{path} {_does_not_run(facts)} ({first_line(error)}); compile the model again."
        ) from error
    return CompiledModel(program, facts)


def output_tensors(outputs: Any) -> list[torch.Tensor]:
    """Return a model's outputs in their order, those in lists and tuples too."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values if value is not None for tensor in output_tensors(value)]


def first_numbers(outputs: Any) -> torch.Tensor:
    """Return the first numbers of a model's first output, as a file keeps them."""
    return output_tensors(outputs)[0].detach().flatten()[:_KEPT_OUTPUTS].float().cpu()


def are_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether a program computed what its model did, up to rounding."""
    if found.shape != expected.shape:
        return False
    found, expected = found.detach().float(), expected.detach().float()
    return bool((found - expected).norm() <= LARGEST_ERROR * expected.norm())


def _check_numbers(name: str, numbers: torch.Tensor, count: int) -> None:
    """Refuse what a program would read beyond a table for, and then end the process."""
    if numbers.is_floating_point() or numbers.is_complex():
        raise FiftyfoldError(f"{name} must be integers, not {numbers.dtype}.")
    low, high = (int(bound) for bound in numbers.aminmax())
    if low < 0 or high >= count:
        raise FiftyfoldError(f"{name} must be 0 to {count - 1}, but there are some from {low} to {high}.")


def _does_not_run(facts: ProgramFacts) -> str:
    return f"was compiled by torch {facts.torch} and does not run here by torch {torch.__version__}"
