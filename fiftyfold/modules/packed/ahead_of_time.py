"""A model's forward pass as machine code, compiled ahead of time for machines like this one.

With few tokens much of a small model's time is Python's. ``torch.compile`` leaves guards that are checked at each call;
a program that was compiled ahead of time has neither. It is torch's ``.pt2`` package: the program with all weights
inside, for inference alone. It is machine code, so load only what you compiled yourself; the exported folder is what to
hand on.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import fiftyfold.kernels.operators  # noqa: F401 - a program may call them
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.file_replacement import replaced_file
from fiftyfold.kernels.backends import backend_for

SUFFIX = ".pt2"

_METADATA_KEY = "fiftyfold"
_SIZES = ((2, 8), (1, 8), (3, 5), (2, 1), (1, 1))
"""Sentences and tokens that a program is tried with; it is traced with the first."""
_LARGEST_ERROR = 0.05
"""Of the outputs' length. Compiled norms round otherwise than torch's, and 8-bit inputs near a tie then take another
code, which moves the outputs by about a thousandth; a program that computes something else is off by more than that."""
_KEPT_OUTPUTS = 64


@dataclass(frozen=True)
class ProgramFacts:
    """What a file says about its program, beside what torch says.

    Attributes:
        model: the class that was compiled.
        inputs: names of the program's inputs, each (sentences, tokens).
        longest: tokens that a sentence may have, if the model has a limit.
        words: entries of the vocabulary.
        torch: the version that compiled it.
        instructions: what the processor that compiled it could do.
        sample: tokens of two sentences without padding.
        outputs: the first numbers that the model gave for them.
    """

    model: str
    inputs: list[str]
    longest: int | None
    words: int
    torch: str
    instructions: list[str]
    sample: list[list[int]]
    outputs: list[float]


class CompiledModel(nn.Module):
    """A program that :func:`compile_model` wrote, called as the model itself is.

    Args:
        program: torch's loaded package.
        facts: what its file says.
        device: that it was compiled for.
    """

    def __init__(self, program: Any, facts: ProgramFacts, device: torch.device) -> None:
        super().__init__()
        self._program, self.facts, self.device = program, facts, device

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
            FiftyfoldError: if the shapes or tokens do not fit the model.
        """
        self._check(input_ids, attention_mask, token_type_ids)
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        # The program reads memory as it was laid out when it was traced.
        return self._program(
            **{name: given[name].to(self.device, torch.int64).contiguous() for name in self.facts.inputs}
        )

    def _check(self, input_ids: torch.Tensor, *others: torch.Tensor | None) -> None:
        facts, shape = self.facts, input_ids.shape
        if input_ids.dim() != 2 or not input_ids.numel():
            raise FiftyfoldError(f"input_ids must be (sentences, tokens), not of shape {tuple(shape)}.")
        if strange := [other for other in others if other is not None and other.shape != shape]:
            raise FiftyfoldError(f"an input of shape {tuple(strange[0].shape)} does not go with {tuple(shape)} tokens.")
        if facts.longest is not None and shape[1] > facts.longest:
            raise FiftyfoldError(f"{facts.model} takes at most {facts.longest} tokens, not {shape[1]}.")
        low, high = input_ids.aminmax()
        if low < 0 or high >= facts.words:
            raise FiftyfoldError(f"tokens must be 0 to {facts.words - 1}, but there are some from {low} to {high}.")


def compile_model(model: PreTrainedModel, file: str | os.PathLike[str]) -> CompiledModel:
    """Compile a model's forward pass for machines like this one, write it to a file, and load it from there.

    It takes half a minute or some, a C++ compiler for a model on a CPU, and torch 2.6. Before the file has its name the
    program computed, for batches of several sizes, what the model computes. Batches may have any size.

    Args:
        model: one that reads tokens, as ``from_pretrained`` or :func:`.load` opens an exported folder; it stays as it
            is, in evaluation mode. For language models without their cache.
        file: to write; must end in ``.pt2`` and not exist.

    Raises:
        FiftyfoldError: if there is such a file, torch cannot compile the model, or the program computes something else.
    """
    path = Path(file).expanduser()
    if path.suffix != SUFFIX:
        raise FiftyfoldError(f"torch wants compiled programs in files that end in {SUFFIX}, not {path.name}.")
    if path.exists():
        raise FiftyfoldError(f"{path} exists already; name another file.")
    if not path.parent.is_dir():
        raise FiftyfoldError(f"there is no folder {path.parent}.")
    _check_model(model)
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / path.name
        _compile(model, package)
        compiled = load_compiled(package)
        for size in _SIZES:
            _compare(model, compiled, size)
        with package.open("rb") as source, replaced_file(path) as target:
            shutil.copyfileobj(source, target)
    return load_compiled(path)


def load_compiled(file: str | os.PathLike[str]) -> CompiledModel:
    """Load a program that :func:`compile_model` wrote, and try it.

    It is machine code: load only what you compiled yourself.

    Raises:
        FiftyfoldError: if the file is absent, corrupt, not one of ours, or was compiled for another kind of machine.
    """
    path = Path(file).expanduser()
    facts, device = _read_facts(path)
    if missing := sorted(set(facts.instructions) - set(_instructions())):
        raise FiftyfoldError(
            f"{path} was compiled on a processor that has {', '.join(missing[:3])}, which this one has not; compile "
            "the model here."
        )
    backend_for(device.type)
    try:
        compiled = CompiledModel(torch._inductor.aoti_load_package(str(path)), facts, device)
        outputs = _first_outputs(compiled(torch.tensor(facts.sample)))
    except FiftyfoldError:
        raise
    except Exception as error:  # whatever torch's loader, another torch or a missing operator make of it
        raise FiftyfoldError(
            f"{path}, compiled by torch {facts.torch}, does not run by torch {torch.__version__} here "
            f"({first_line(error)}); compile the model again."
        ) from error
    if not _close(outputs, torch.tensor(facts.outputs)):
        raise FiftyfoldError(f"{path} does not compute here what its model did; compile the model again.")
    return compiled


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


def _check_model(model: Any) -> None:
    readable = isinstance(model, PreTrainedModel) and model.main_input_name == "input_ids"
    if not readable or model.config.is_encoder_decoder:
        raise FiftyfoldError(
            f"only models of transformers that read tokens and nothing else are compiled, not {type(model).__name__}."
        )


def _compile(model: PreTrainedModel, package: Path) -> None:
    example = _batch(model, _SIZES[0])
    # The first call keeps what a layer makes once, which a program then holds.
    outputs = model(**example | {"attention_mask": torch.ones_like(example["attention_mask"])})
    free = dict.fromkeys(range(2), torch.export.Dim.DYNAMIC)
    config = model.config.get_text_config()
    facts = ProgramFacts(
        model=type(model).__name__,
        inputs=list(example),
        longest=getattr(config, "max_position_embeddings", None),
        words=config.vocab_size,
        torch=torch.__version__,
        instructions=_instructions(),
        sample=example["input_ids"].tolist(),
        outputs=_first_outputs(outputs).tolist(),
    )
    options = {"cpp.dynamic_threads": True, "aot_inductor.metadata": {_METADATA_KEY: json.dumps(asdict(facts))}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = dict.fromkeys(example, free)
            program = torch.export.export(_Forward(model), (), kwargs=example, dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    except Exception as error:  # a compiler that is missing or fails, in a model of any kind
        reason = getattr(error, "inner_exception", error)
        raise FiftyfoldError(f"torch cannot compile {type(model).__name__} ({first_line(reason)[:200]}).") from error


def _batch(model: PreTrainedModel, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return random tokens, the last one of the first sentence padding where that has more than one."""
    words = model.config.get_text_config().vocab_size
    tokens = torch.randint(words, size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 1:][-1:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(tokens)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _compare(model: PreTrainedModel, compiled: CompiledModel, size: tuple[int, int]) -> None:
    batch = _batch(model, size)
    expected = _first_output(model(**batch))
    what = (
        f"torch {torch.__version__} cannot compile {type(model).__name__}: for {size[0]} x {size[1]} tokens its program"
    )
    try:
        found = _first_output(compiled(**batch))
    except RuntimeError as error:  # where torch took a size of the example for a constant
        raise FiftyfoldError(f"{what} fails ({first_line(error)[:200]}).") from error
    if not _close(found, expected):
        raise FiftyfoldError(f"{what} computes something else than the model.")


def _first_output(outputs: Any) -> torch.Tensor:
    output: torch.Tensor = outputs[0]
    return output.detach().float().cpu()


def _first_outputs(outputs: Any) -> torch.Tensor:
    return _first_output(outputs).flatten()[:_KEPT_OUTPUTS]


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= _LARGEST_ERROR * expected.norm())


def _read_facts(path: Path) -> tuple[ProgramFacts, torch.device]:
    """Read what a file says without running anything of it, and its checksums."""
    if not path.is_file():
        raise FiftyfoldError(f"there is no file {path}.")
    with _explained(path), zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise FiftyfoldError(f"{path} is corrupt: {broken} has another checksum; compile the model again.")
        name = next(name for name in archive.namelist() if name.endswith("wrapper_metadata.json"))
        metadata = json.loads(archive.read(name))
        return ProgramFacts(**json.loads(metadata[_METADATA_KEY])), torch.device(metadata["AOTI_DEVICE_KEY"])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise FiftyfoldError(f"{path} is corrupt ({error}); compile the model again.") from error
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise FiftyfoldError(f"{path} is not a program that fiftyfold compiled.") from error


def _instructions() -> list[str]:
    """Return what the processor can do, as Linux lists it; the compiler may use all of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(next(found, []))
