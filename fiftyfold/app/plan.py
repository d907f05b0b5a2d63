"""``fiftyfold plan``: bytes and parameters before and after, from a bare configuration, without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fiftyfold.app.trainer_cli import RECIPES
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.modules import prune_layers, quantize, quantize_bitsandbytes, reduce_layers, tensorize
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.quantization.bitsandbytes_layers import Bits
from fiftyfold.modules.sizes import Size, model_size
from fiftyfold.modules.structure import structure_log


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan.

    Attributes:
        model: what has been done up to here.
        numbers: type of the numbers.
        parameters: how many numbers are kept.
        gigabytes: 10⁹ bytes of the weights in a file.
    """

    model: str
    numbers: str
    parameters: int
    gigabytes: float


def plan(
    model: str,
    *,
    recipe: str | None = None,
    layers: Literal["all", "every-other", "first", "last"] | list[int] = "all",
    keep_layers: int | None = None,
    keep: float | None = None,
    bond_dimension: int | None = None,
    cores: int = 3,
    exclude: list[str] | str | None = None,
    weight_bits: Literal[1, 2, 3, 4, 8] | None = None,
    rest_bits: Literal[4, 8] | None = None,
    rest_targets: list[str] | str | None = None,
    output: str | None = None,
) -> None:
    """Tell what a compression would come to, before anything is downloaded or trained.

    A network counts with the numbers that an exported folder keeps; a few more train (its gauge is free then).

    Args:
        model: a folder, a hub id, a configuration file, or one that is shipped: compactifai/llama2_7b.
        recipe: a recipe for `fiftyfold fit`, such as compactifai/size_faithful; what is done is what its callbacks do,
            after the layers that its module leaves out.
        layers: which layers to keep.
        keep_layers: how many, with every-other, first or last.
        keep: share of each matrix's numbers that its tensor network keeps.
        bond_dimension: size of the networks' bonds, instead of keep.
        cores: cores of each network.
        exclude: patterns of names that are not tensorized.
        weight_bits: quantize weights, cores included, with fiftyfold's own quantizer.
        rest_bits: quantize dense linear layers that are left to so many bits by bitsandbytes.
        rest_targets: patterns of those layers' names; by default all of them.
        output: a JSON file to write the rows to.
    """
    if output is not None and Path(output).exists():
        raise FiftyfoldError(f"{output} is there already; name another file.")
    if keep is not None and bond_dimension is not None:
        raise FiftyfoldError("keep and bond_dimension both tell how large networks are; give one of them.")
    steps: list[tuple[str, Callable[[nn.Module], object]]] = []
    if layers != "all":
        steps.append(("layers reduced", lambda m: reduce_layers(m, layers, keep_layers)))
    if keep is not None or bond_dimension is not None:
        bond = 64 if bond_dimension is None else bond_dimension
        steps.append(("tensorized", lambda m: tensorize(m, cores, bond, keep=keep, exclude=exclude or ())))
    if weight_bits is not None:
        steps.append((f"{weight_bits}-bit weights", lambda m: quantize(m, weight_bits=weight_bits)))
    from_recipe = recipe_steps(recipe) if recipe else []
    for name in {name for name, _ in from_recipe} & {name for name, _ in steps}:
        raise FiftyfoldError(f"the recipe's layers are {name} already; leave out the option that does it again.")
    rows = make_plan(empty_model(model), [*from_recipe, *steps], rest_bits, rest_targets)
    print_plan(rows, title=f"{model}{' · ' + recipe if recipe else ''}")
    if output is not None:
        Path(output).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def make_plan(
    model: PreTrainedModel,
    steps: Sequence[tuple[str, Callable[[nn.Module], object]]],
    rest_bits: Bits | None = None,
    rest_targets: Sequence[str] | None = None,
) -> list[PlanRow]:
    """Carry steps out on a model, on the meta device for instance, and measure after each.

    Returns:
        First the original in float32 and float16 and, without scales, in int8 and int4, as plain quantization would
        have it; then a row after each step.
    """
    whole = model_size(model, 4)
    rows = [
        PlanRow("original", kind, whole.parameters, whole.parameters * bits / 8e9)
        for kind, bits in (("float32", 32), ("float16", 16), ("int8", 8), ("int4", 4))
    ]
    for name, step in steps:
        step(model)
        quantized = any(entry["op"] == "quantize" for entry in structure_log(model))
        rows.append(_row(name, "mixed" if quantized else "float16", model_size(model)))
    if rest_bits is not None:
        targets: Any = "." if rest_targets is None else rest_targets
        quantize_bitsandbytes(model, rest_bits, targets=targets)
        rows.append(_row(f"rest in {rest_bits} bits", "mixed", model_size(model)))
    return rows


def empty_model(source: str) -> PreTrainedModel:
    """Build a model without weights, on the meta device.

    Args:
        source: as for :func:`plan`.

    Raises:
        FiftyfoldError: if there is no such configuration, or transformers does not know its model.
    """
    config = _read_config(source)
    name = next(iter(config.architectures or ()), None)
    kind: Any = transformers.AutoModelForCausalLM if name is None else getattr(transformers, str(name), None)
    if name is not None and not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise FiftyfoldError(f"transformers has no model {name}, which the configuration {source!r} names.")
    build = kind.from_config if name is None else kind._from_config
    with torch.device("meta"):
        return build(config)


def recipe_steps(recipe: str) -> list[tuple[str, Callable[[nn.Module], object]]]:
    """Return what a recipe does to a model in the end: the layers that its module keeps, then its callbacks in order.

    Raises:
        FiftyfoldError: if the recipe cannot be read, compresses nothing, or by what only data can tell.
    """
    path = next((p for p in (Path(recipe), RECIPES / f"{recipe}.yaml") if p.is_file()), None)
    if path is None:
        raise FiftyfoldError(f"there is no recipe {recipe!r}; name a YAML file or a shipped one.")
    steps = []
    for name, arguments in _read_recipe(path):
        if name == "MatrixCompression":
            raise FiftyfoldError(
                f"{path} compresses by {name}, whose networks the data choose: its keep is the share of the matrices' "
                "bytes that they take, and only a run tells more."
            )
        if name in _STEPS:
            text, step = _STEPS[name]
            steps.append((text, _bound(name, step, arguments)))
    if not steps:
        raise FiftyfoldError(f"nothing in {path} compresses anything.")
    return steps


def print_plan(rows: Sequence[PlanRow], *, title: str) -> None:
    """Print a plan; the last columns compare with float16 and float32."""
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False, pad_edge=False)
    for heading in ("", "numbers", "parameters", "GB", "of float16", "of float32"):
        table.add_column(heading, justify="left" if heading in ("", "numbers") else "right")
    whole, half = rows[0].gigabytes, rows[1].gigabytes
    for row in rows:
        table.add_row(
            row.model,
            row.numbers,
            f"{row.parameters / 1e9:.3f} B" if row.parameters >= 10**9 else f"{row.parameters / 1e6:.2f} M",
            f"{row.gigabytes:.2f}" if row.gigabytes >= 0.1 else f"{row.gigabytes:.5f}",
            f"{row.gigabytes / half:.1%}",
            f"{row.gigabytes / whole:.1%}",
        )
    Console().print(table)


def _row(name: str, numbers: str, size: Size) -> PlanRow:
    return PlanRow(name, numbers, size.parameters, size.bytes / 1e9)


def _read_config(source: str) -> PretrainedConfig:
    path = next((p for p in (Path(source).expanduser(), RECIPES / f"{source}.json") if p.exists()), None)
    try:
        return AutoConfig.from_pretrained(source if path is None else path)
    except (OSError, ValueError, KeyError) as error:
        raise FiftyfoldError(f"no configuration can be read from {source!r} ({first_line(error)}).") from error


def _read_recipe(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the classes of a recipe that may compress, with their arguments."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        callbacks = content["trainer"]["callbacks"] or []
        found = [(str(each["class_path"]), dict(each.get("init_args") or {})) for each in callbacks]
        module = dict((content.get("model") or {}).get("init_args") or {})
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FiftyfoldError(f"{path} is no recipe with callbacks of a trainer.") from error
    named = [(class_path.rpartition(".")[2], arguments) for class_path, arguments in found]
    if module.get("layers", "all") == "all":
        return named
    return [("LayerReduction", {"layers": module["layers"], "keep": module.get("keep")}), *named]


def _last(value: Any) -> Any:
    """Return what a value comes to that steps down by moments."""
    return min(value.values()) if isinstance(value, Mapping) else value


def _tensorize(model: nn.Module, arguments: dict[str, Any]) -> None:
    tensorize(model, **{name: _last(value) for name, value in arguments.items() if name != "start"})


def _quantize(model: nn.Module, arguments: dict[str, Any]) -> None:
    quantize(model, **{name: _last(value) for name, value in arguments.items() if name != "start"})


def _reduce(model: nn.Module, arguments: dict[str, Any]) -> None:
    reduce_layers(model, arguments.get("layers", "every-other"), arguments.get("keep"))


def _prune(model: nn.Module, arguments: dict[str, Any]) -> None:
    # Which layers go is measured in training; the size is the same where they are alike.
    layers = layer_stack(model, find_layer_stack(model))
    prune_layers(model, sum(arguments["schedule"].values()), [0.0] * len(layers))


_STEPS: dict[str, tuple[str, Callable[[nn.Module, dict[str, Any]], None]]] = {
    "TensorNetworkDecomposition": ("tensorized", _tensorize),
    "LayerReduction": ("layers reduced", _reduce),
    "LayerPruning": ("layers pruned", _prune),
    "QuantizationAwareTraining": ("quantized", _quantize),
}


def _bound(
    name: str, step: Callable[[nn.Module, dict[str, Any]], None], arguments: dict[str, Any]
) -> Callable[[nn.Module], object]:
    def carry_out(model: nn.Module) -> None:
        try:
            step(model, arguments)
        except (AttributeError, KeyError, TypeError) as error:
            raise FiftyfoldError(f"the recipe's {name} cannot be carried out ({error}); mend its init_args.") from error

    return carry_out
