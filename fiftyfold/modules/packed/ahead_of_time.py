"""A model's forward pass as machine code, compiled ahead of time for machines like this one.

With few tokens much of a small model's time is Python's. ``torch.compile`` leaves guards and a wrapper that run in
Python at each call; a program that was compiled ahead of time has neither. It is torch's ``.pt2`` package: the program
with all weights inside, for inference alone. It is machine code, so load only what you compiled yourself; the exported
folder is what to hand on.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.file_replacement import created_file
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.modules.packed.compiled_program import (
    OUTPUT_PACKAGE,
    CompiledModel,
    are_close,
    first_numbers,
    load_compiled,
    open_program,
    output_tensors,
)
from fiftyfold.modules.packed.program_facts import ProgramFacts, processor_instructions
from fiftyfold.modules.packed.shared_inputs import one_product_for_shared_inputs

SUFFIX = ".pt2"

_TRACED = (2, 8)
_SIZES = (_TRACED, (1, 8), (3, 5), (2, 1), (1, 1))
"""Sentences and tokens that a program is tried with."""
_LONGEST_TRIED = 512


def compile_model(model: nn.Module, file: str | os.PathLike[str]) -> CompiledModel:
    """Compile a model's forward pass for machines like this one, write it to a file, and load it from there.

    It takes half a minute or some, torch 2.13, and a C++ compiler for a model on a CPU. Before the file has its name,
    the program computes batches of several sizes, and all outputs are compared with the model's. Batches may have any
    size.

    Args:
        model: one that reads tokens, as ``from_pretrained`` or :func:`.load` opens an exported folder; it stays as it
            is, in evaluation mode. For language models without their cache.
        file: to write; must end in ``.pt2`` and not exist.

    Raises:
        FiftyfoldError: if there is such a file, torch cannot compile the model, or the program computes something else.
    """
    path = Path(file).expanduser()
    _check_place(path)
    model = _readable(model).eval()
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / path.name
        _compile(model, package)
        compiled = open_program(package)
        for size in [*_SIZES, (1, min(compiled.facts.longest or _LONGEST_TRIED, _LONGEST_TRIED))]:
            _compare(model, compiled, size)
        try:
            with package.open("rb") as source, created_file(path) as target:
                shutil.copyfileobj(source, target)
        except FileExistsError as error:
            raise FiftyfoldError(f"{path} exists by now; name another file.") from error
    return load_compiled(path)


class _Forward(nn.Module):
    """A model's forward pass without a language model's cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.constant = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> Any:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **self.constant)


def _check_place(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise FiftyfoldError(f"torch wants compiled programs in files that end in {SUFFIX}, not {path.name}.")
    if path.exists():
        raise FiftyfoldError(f"{path} exists already; name another file.")
    if not path.parent.is_dir():
        raise FiftyfoldError(f"there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise FiftyfoldError(f"nothing can be written to {path.parent}.")


def _readable(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel) and model.main_input_name == "input_ids":
        config: Any = model.config
        if not config.is_encoder_decoder:
            return model
    raise FiftyfoldError(
        f"only models of transformers that read tokens and nothing else are compiled, not {type(model).__name__}."
    )


def _compile(model: PreTrainedModel, package: Path) -> None:
    example = _batch(model, _TRACED)
    # The first call keeps what a layer makes once, which a program then holds.
    unpadded = example | {"attention_mask": torch.ones_like(example["attention_mask"])}
    unpadded.pop("token_type_ids", None)
    outputs = _outputs(model, unpadded)
    if type(outputs).__module__.split(".")[0] not in (OUTPUT_PACKAGE, "builtins"):
        raise FiftyfoldError(f"{type(outputs).__name__} is not transformers' own, so no other process could return it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = dict.fromkeys(example, dict.fromkeys(range(2), torch.export.Dim.DYNAMIC))
            with one_product_for_shared_inputs(model, lambda: output_tensors(_Forward(model)(**example))):
                program = torch.export.export(_Forward(model), (), kwargs=example, dynamic_shapes=shapes)
            facts = _facts(model, program, unpadded["input_ids"], outputs)
            options = {"cpp.dynamic_threads": True, "aot_inductor.metadata": facts.to_metadata()}
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    except Exception as error:  # a compiler that is missing or fails, in a model of any kind
        reason = getattr(error, "inner_exception", error)
        raise FiftyfoldError(f"torch cannot compile {type(model).__name__} ({first_line(reason)[:200]}).") from error


def _facts(model: PreTrainedModel, program: Any, sample: torch.Tensor, outputs: Any) -> ProgramFacts:
    return ProgramFacts(
        model=type(model).__name__,
        device=model.device.type,
        inputs=list(_batch(model, _TRACED)),
        longest=_longest(model, program),
        words=model.config.get_text_config().vocab_size,
        types=_token_types(model),
        output_module=type(outputs).__module__,
        torch=torch.__version__,
        library=model.device.type == "cpu" and cpu_status().library is not None,
        instructions=processor_instructions(),
        sample=sample.tolist(),
        outputs=first_numbers(outputs).tolist(),
    )


def _longest(model: PreTrainedModel, program: Any) -> int | None:
    """Return how many tokens a sentence may have: what the model states, its table holds and the trace allows."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.named_modules():
        padding, entries = getattr(module, "padding_idx", None), getattr(module, "num_embeddings", None)
        if name.endswith("position_embeddings") and isinstance(padding, int) and isinstance(entries, int):
            limits.append(entries - padding - 1)  # RoBERTa's kin count positions from there
    uppers = [values.upper for values in program.range_constraints.values()]
    limits += [int(upper) for upper in uppers if upper.is_Integer]
    return min(limits, default=None)


def _token_types(model: PreTrainedModel) -> int:
    types = getattr(model.config, "type_vocab_size", 0)
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return types if takes and isinstance(types, int) and types > 1 else 0


def _batch(model: PreTrainedModel, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return random tokens; half of the first sentence is padding, and the beginning of a third one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, size, generator=generator)
    mask = torch.ones_like(tokens)
    mask[:1, (size[1] + 1) // 2 :] = 0
    mask[2:3, : size[1] // 2] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if types := _token_types(model):
        batch["token_type_ids"] = torch.randint(types, size, generator=generator)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _outputs(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Any:
    try:
        return _Forward(model)(**batch)
    except Exception as error:  # of a model of any kind
        sentences, tokens = batch["input_ids"].shape
        raise FiftyfoldError(
            f"{type(model).__name__} itself cannot compute {sentences} x {tokens} tokens ({first_line(error)[:200]})."
        ) from error


def _compare(model: PreTrainedModel, compiled: CompiledModel, size: tuple[int, int]) -> None:
    batch = _batch(model, size)
    expected = output_tensors(_outputs(model, batch))
    name, tokens = type(model).__name__, " x ".join(map(str, size))
    what = f"torch {torch.__version__} cannot compile {name}: for {tokens} tokens its program"
    try:
        found = output_tensors(compiled(**batch))
    except RuntimeError as error:  # where torch took a size of the example for a constant
        raise FiftyfoldError(f"{what} fails ({first_line(error)[:200]}).") from error
    if len(found) != len(expected) or not all(map(are_close, found, expected)):
        raise FiftyfoldError(f"{what} computes something else than the model.")
