"""``fiftyfold profile``: how sensitive each matrix of a language model is to tensorization."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from fiftyfold.app.evaluate import longest_window, score_text
from fiftyfold.app.progress import shown
from fiftyfold.app.training import quiet_lightning
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.datamodules.glue import at_least_one
from fiftyfold.modules.digest import digest_of, identity_of
from fiftyfold.modules.journal import open_journal
from fiftyfold.modules.layer_sensitivity import approximated, input_moments, output_error, profiled_matrices
from fiftyfold.modules.pretrained import load_language_model
from fiftyfold.modules.tensor_network.form import NetworkForm, balanced_form, low_rank_form
from fiftyfold.modules.tensor_network.layers import matrix_shape
from fiftyfold.modules.tensor_network.tensorize import Split, check_arguments

Metric = Literal["nats", "perplexity", "accuracy", "output_error"]


@dataclass(frozen=True)
class Cell:
    """One matrix as a network of one bond dimension.

    Attributes:
        layer: the matrix.
        bond_dimension: as asked for.
        kept: share of the matrix's numbers that the network has.
        metric: name of what was measured.
        value: the metric of the whole model, or the relative error of the layer's output.
        change: the value less that of the original model.
    """

    layer: str
    bond_dimension: int
    kept: float
    metric: str
    value: float
    change: float


def profile(
    model: str,
    *,
    data: str,
    output: str | None = None,
    metric: Metric = "nats",
    bond_dimensions: list[int] | int | None = None,
    cores: int = 3,
    split: Split = "even",
    targets: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    tokens: int = 8192,
    window: int | None = None,
    batch_size: int = 8,
    document_separator: str = "<|endoftext|>",
    text_column: str = "text",
) -> None:
    """Tensorize one matrix at a time, measure the model, and write a table and a heat-map.

    Ctrl-C or a crash loses one cell: the same command goes on where it stopped, and one with other bond dimensions or
    matrices adds theirs.

    Args:
        model: a folder or a hub id.
        data: text to measure on: its validation set, or else its training set.
        output: folder for profile.csv, profile.json and profile.png; by default the model's name with -profile.
        metric: nats, perplexity or accuracy of the whole model, as the paper does; output_error is cheap: it takes one
            pass over the text, and tells the relative error of each layer's own output.
        bond_dimensions: the sweep; by default 10, 20, ... 90, as the paper's figure.
        cores: cores of each network.
        split: even, or low_rank, whose bond dimension is the rank.
        targets: patterns of matrices' names; by default all of the stacked layers.
        exclude: patterns of names to leave out.
        tokens: how much text to measure on.
        window: tokens that the model sees at once; by default what it reads, at most 512.
        batch_size: windows at once.
        document_separator: what stands between two documents of a .txt file.
        text_column: where JSON objects, parquet files and the hub's sets have their text.
    """
    at_least_one("tokens", tokens)
    quiet_lightning()
    bonds = list(range(10, 100, 10)) if bond_dimensions is None else bond_dimensions
    bonds = [bonds] if isinstance(bonds, int) else sorted(bonds)
    for bond in bonds or [0]:
        check_arguments(cores, bond, None, split)
    loaded = load_language_model(model, "model", "causal")
    length = longest_window(loaded, 512) if window is None else window
    text = LanguageModelingDataModule(
        model,
        data,
        sequence_length=length,
        eval_batch_size=batch_size,
        document_separator=document_separator,
        text_column=text_column,
    )
    layers = profiled_matrices(loaded, "default" if targets is None else targets, exclude or ())
    forms = {(name, bond): _form(loaded.get_submodule(name), cores, bond, split) for name in layers for bond in bonds}
    options: dict[str, Any] = {
        **{"model": model, "data": data, "metric": metric, "cores": cores, "split": split},
        **{"tokens": tokens, "window": length, "document_separator": document_separator, "text_column": text_column},
    }
    model_digest, row = digest_of(identity_of(loaded)), text.row(_split(text))[:tokens]
    options |= {"model_digest": model_digest, "text_digest": digest_of(row)}
    folder = Path(output or f"{Path(model).resolve().name}-profile").expanduser()
    with open_journal(folder, lambda: options) as journal:
        missing = {place: form for place, form in forms.items() if _key(*place) not in journal}
        measure = _one_pass if metric == "output_error" else _one_at_a_time
        with shown("Cells") as report:
            new = measure(loaded, text, missing, metric=metric, tokens=tokens)
            for done, cell in enumerate(new, len(forms) - len(missing) + 1):
                journal.add(_key(cell.layer, cell.bond_dimension), asdict(cell))
                report("measured", done, len(forms))
        order = [name for name, _ in loaded.named_modules()]
        read = functools.partial(_read_cell, metric=metric, known=order)
        cells = [journal.read(key, functools.partial(read, key=key)) for key in journal.keys]
        cells.sort(key=lambda cell: (order.index(cell.layer), cell.bond_dimension))
        write_profile(folder, options, cells)
    print(f"{folder}: {len(cells)} cells in profile.csv, profile.json and profile.png")


def write_profile(folder: Path, options: dict[str, Any], cells: Sequence[Cell]) -> None:
    """Write the table as CSV and JSON, and the heat-map of the changes."""
    with (folder / "profile.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(cells[0])))
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in cells)
    content = {"options": options, "cells": [asdict(cell) for cell in cells]}
    (folder / "profile.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_heat_map(cells, folder / "profile.png")


def draw_heat_map(cells: Sequence[Cell], path: Path) -> None:
    """Draw the change of the metric by layer and bond dimension."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(cell.layer for cell in cells))
    bonds = sorted({cell.bond_dimension for cell in cells})
    changes = {(cell.layer, cell.bond_dimension): cell.change for cell in cells}
    grid = [[changes.get((layer, bond), float("nan")) for bond in bonds] for layer in layers]
    figure = Figure(figsize=(3.5 + 0.6 * len(bonds), 1.5 + 0.25 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis_r" if cells[0].metric == "accuracy" else "viridis")
    axes.set_xticks(range(len(bonds)), [str(bond) for bond in bonds])
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_xlabel("bond dimension")
    figure.colorbar(image, label=f"change of {cells[0].metric}")
    figure.savefig(path, dpi=120)


def _one_at_a_time(
    model: PreTrainedModel,
    text: LanguageModelingDataModule,
    forms: dict[tuple[str, int], NetworkForm],
    *,
    metric: Metric,
    tokens: int,
) -> Iterable[Cell]:
    if not forms:
        return
    split = _split(text)

    def measure() -> float:
        return float(score_text(model, text, split, batch_size=text.eval_batch_size, limit=tokens).to_json()[metric])

    whole = measure()
    for (name, bond), form in forms.items():
        with approximated(model.get_submodule(name), form):
            value = measure()
        yield Cell(name, bond, _kept(form), metric, value, value - whole)


def _one_pass(
    model: PreTrainedModel,
    text: LanguageModelingDataModule,
    forms: dict[tuple[str, int], NetworkForm],
    *,
    metric: Metric,
    tokens: int,
) -> Iterable[Cell]:
    if not forms:
        return
    row = text.row(_split(text))[:tokens]
    length = min(text.sequence_length, len(row))
    sequences = row[: len(row) // length * length].view(-1, length)
    batches = [{"input_ids": part} for part in sequences.split(text.eval_batch_size)]
    moments = input_moments(model, list(dict.fromkeys(name for name, _ in forms)), batches)
    for (name, bond), form in forms.items():
        value = output_error(model.get_submodule(name), form, moments[name])
        yield Cell(name, bond, _kept(form), metric, value, value)


def _kept(form: NetworkForm) -> float:
    return form.count / (form.shape[0] * form.shape[1])


def _split(text: LanguageModelingDataModule) -> str:
    return "validation" if text.has_split("validation") else text.last_split()


def _form(layer: nn.Module, cores: int, bond: int, split: Split) -> NetworkForm:
    shape = matrix_shape(layer)
    return low_rank_form(shape, bond) if split == "low_rank" else balanced_form(shape, cores, bond)


def _key(layer: str, bond_dimension: int) -> str:
    return f"{layer} at {bond_dimension}"


def _read_cell(values: Any, key: str, metric: Metric, known: Collection[str]) -> Cell:
    """Return a cell that this run, an interrupted one, or one of another sweep left, of one of the known layers.

    Raises:
        ValueError: if it is not that of the key.
        TypeError: if it is no cell.
    """
    cell = Cell(**values)
    if (_key(cell.layer, cell.bond_dimension), cell.metric) != (key, metric) or cell.layer not in known:
        raise ValueError("another cell")
    # Not all are finite: a perplexity may be beyond all numbers.
    if not all(isinstance(each, float) for each in (cell.kept, cell.value, cell.change)):
        raise ValueError("no numbers")
    return cell
