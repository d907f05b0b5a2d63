"""Writing a compressed model into a folder: checked by opening it again, and there completely or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError
from fiftyfold.folder_replacement import complete_replacement, replaced_folder
from fiftyfold.modules.packed.contents import (
    Contents,
    collect_tensors,
    pack_model,
    round_rest,
    separate_dense_weights,
)
from fiftyfold.modules.packed.example import Example, compute, default_example
from fiftyfold.modules.packed.load import STRUCTURE_FILE, WEIGHTS_FILE, load, read_manifest
from fiftyfold.modules.packed.manifest import RestDtype
from fiftyfold.modules.packed.plugin import METHOD
from fiftyfold.modules.packed.report import (
    FLOAT32_BYTES,
    ExportReport,
    beyond_xtc,
    count_parameters,
    ideal_ratio,
    largest_difference,
    part_bytes,
)
from fiftyfold.modules.packed.skeleton import expected_tensors
from fiftyfold.modules.packed.weights_file import write_tensors
from fiftyfold.modules.structure import compression_root
from fiftyfold.modules.surgery import replace_module

__all__ = ["REPORT_FILE", "export", "round_rest"]

REPORT_FILE = "fiftyfold_report.json"
"""Where an exported folder keeps its report."""

# A reloaded model whose weights are equal but whose sums are rounded in another order stays far below this.
_LARGEST_RELATIVE_DIFFERENCE = 1e-3


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rest_dtype: RestDtype = "float16",
    overwrite: bool = False,
    report: Mapping[str, Any] | None = None,
    example: Example | None = None,
) -> ExportReport:
    """Write a model with its quantized weights packed into bits, and check the folder by opening it.

    Binary weights take 1 bit each, ternary ones 1.6, others 3, 4 or 8; scales take 16. By default the pooler and the
    position and token-type embeddings are quantized too, which XTC leaves in float32; biases, normalizations and the
    task head are narrowed to ``rest_dtype``. The report names the modules that are packed beyond XTC's.

    The model is not changed. Weights on the disk equal what it computed with, bit for bit, apart from that narrowing,
    whose effect on the outputs the report states.

    Args:
        model: a transformers model or any other module; of a LightningModule, the part that was compressed.
        folder: where to write. It must not exist, or be empty.
        tokenizer: written beside the model, so that pipelines find it.
        rest_dtype: ``"float16"`` or ``"float32"``, for everything that is not packed.
        overwrite: replace ``folder`` if it is an exported folder; the old one stays until the new one is complete. What
            a kill in the very moment of replacing leaves undone, the next export to ``folder`` completes first.
        report: JSON values to keep in ``fiftyfold_report.json`` under ``"run"``.
        example: an input to compare outputs by; models of transformers that read tokens have one of their own.

    Returns:
        Sizes and differences, as measured.

    Raises:
        FiftyfoldError: if the folder holds something, cannot be written, or does not give the model back; nothing is
            left half written.
    """
    target = Path(folder).expanduser().resolve()
    complete_replacement(target)
    _check_arguments(target, rest_dtype, overwrite, tokenizer, report)
    twin = _private_copy(model)
    example = default_example(twin) if example is None else example
    trained = _outputs(twin, example)
    separate_dense_weights(twin)
    round_rest(twin, rest_dtype)
    rounded = _outputs(twin, example)
    extra = beyond_xtc(twin)
    skeleton = None if _opens_by_itself(twin) else copy.deepcopy(twin)
    contents = pack_model(twin, rest_dtype)
    with replaced_folder(target) as aside:
        _write_model(aside, twin, contents)
        _write_tokenizer(aside, tokenizer)
        reloaded = _outputs(_reload(aside, skeleton, contents), example)
        _check_outputs(rounded, reloaded)
        sizes = _measure(aside, twin, contents)
        result = ExportReport(
            folder=str(target),
            **sizes,
            beyond_xtc=extra,
            rest_dtype=rest_dtype,
            outputs_equal=_equal(rounded, reloaded),
            rounding_difference=largest_difference(trained, reloaded),
        )
        _write_json(aside / REPORT_FILE, {**result.to_json(), "run": dict(report or {})})
    return result


def _outputs(model: nn.Module, example: Example | None) -> list[torch.Tensor] | None:
    return None if example is None else compute(model, example)


def _measure(folder: Path, model: nn.Module, contents: Contents) -> dict[str, Any]:
    parameters, packed_parameters = count_parameters(model, contents)
    file_bytes = (folder / WEIGHTS_FILE).stat().st_size
    return {
        "file_bytes": file_bytes,
        "folder_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "part_bytes": part_bytes(contents, file_bytes),
        "parameters": parameters,
        "packed_parameters": packed_parameters,
        "float32_bytes": parameters * FLOAT32_BYTES,
        "ratio": parameters * FLOAT32_BYTES / file_bytes,
        "ideal_ratio": ideal_ratio(contents),
    }


def _check_arguments(
    target: Path,
    rest_dtype: str,
    overwrite: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    report: Mapping[str, Any] | None,
) -> None:
    if rest_dtype not in get_args(RestDtype):
        raise FiftyfoldError(f"rest_dtype must be one of {', '.join(get_args(RestDtype))}, not {rest_dtype!r}.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise FiftyfoldError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}.")
    try:
        json.dumps(dict(report or {}))
    except (TypeError, ValueError) as error:
        raise FiftyfoldError(f"report cannot be written as JSON: {error}.") from error
    if target.exists() and not target.is_dir():
        raise FiftyfoldError(f"{target} is a file; choose a folder to export to.")
    if target.is_dir() and any(target.iterdir()) and not (overwrite and _is_exported(target)):
        remedy = "only an exported folder is overwritten; " if overwrite else ""
        raise FiftyfoldError(f"{target} already holds something; {remedy}choose another folder.")


def _is_exported(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except FiftyfoldError:
        return False
    return True


def _private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the compressed part of ``model``, on the CPU, in evaluation mode and not compiled."""
    twin = copy.deepcopy(compression_root(model)).to("cpu").eval()
    for module in list(twin.modules()):
        if isinstance(module, OptimizedModule):
            replace_module(twin, module, module._orig_mod)
    twin = twin._orig_mod if isinstance(twin, OptimizedModule) else twin
    for name, tensor in expected_tensors(twin).items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise FiftyfoldError(f"{name!r} has entries that are not numbers; the training has diverged.")
    return twin


def _opens_by_itself(model: nn.Module) -> bool:
    return getattr(transformers, type(model).__name__, None) is type(model)


def _write_model(folder: Path, model: nn.Module, contents: Contents) -> None:
    write_tensors(folder / WEIGHTS_FILE, contents.tensors)
    if not isinstance(model, PreTrainedModel):
        _write_json(folder / STRUCTURE_FILE, contents.manifest.to_json())
        return
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = {"quant_method": METHOD, **contents.manifest.to_json()}
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no exception class of its own
            raise OSError(str(error)) from error


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _reload(folder: Path, skeleton: nn.Module | None, contents: Contents) -> nn.Module:
    """Open what was written, and compare every tensor.

    Raises:
        FiftyfoldError: if one differs.
    """
    model = load(folder, into=skeleton)
    reloaded = collect_tensors(compression_root(model), contents.manifest)
    for name, tensor in contents.tensors.items():
        if name not in reloaded or not torch.equal(reloaded[name], tensor):
            raise FiftyfoldError(f"{name!r} reads back differently from {folder.parent}; nothing was exported.")
    return model


def _check_outputs(expected: list[torch.Tensor] | None, outputs: list[torch.Tensor] | None) -> None:
    difference = largest_difference(expected, outputs)
    if expected is None or difference is None:
        return
    scale = max([1.0, *(float(output.abs().max()) for output in expected if output.numel())])
    if not difference <= _LARGEST_RELATIVE_DIFFERENCE * scale:
        raise FiftyfoldError(
            f"the reloaded model's outputs differ by {difference:.2g} from the model's; nothing was exported. "
            "Does its forward depend on more than its parameters and buffers? Was it cast by .to(), which also rounds "
            "buffers that no file keeps? Then open it with dtype=... instead."
        )


def _equal(expected: list[torch.Tensor] | None, outputs: list[torch.Tensor] | None) -> bool | None:
    if expected is None or outputs is None:
        return None
    return all(torch.equal(one, other) for one, other in zip(expected, outputs, strict=True))
