"""``fiftyfold profile``: how sensitive each matrix of a language model is to tensorization."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import nn
from transformers import PreTrainedModel

from fiftyfold.app.evaluate import longest_window, score_text
from fiftyfold.app.training import quiet_lightning
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.datamodules.glue import at_least_one
from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
from fiftyfold.modules.layer_sensitivity import approximated, input_moments, output_error, profiled_matrices
from fiftyfold.modules.pretrained import load_language_model
from fiftyfold.modules.tensor_network.form import NetworkForm, balanced_form, low_rank_form
from fiftyfold.modules.tensor_network.layers import matrix_shape
from fiftyfold.modules.tensor_network.tensorize import Split, check_arguments

Metric = Literal["nats", "perplexity", "accuracy", "output_error"]

CELLS_FILE = "cells.jsonl"
"""One line for each cell that is done; what an interrupted run goes on from."""


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

    Ctrl-C or a crash loses one cell: the same command goes on where it stopped.

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
    bonds = [bonds] if isinstance(bonds, int) else bonds
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
    options = {
        **{"model": model, "data": data, "metric": metric, "bond_dimensions": bonds, "cores": cores, "split": split},
        **{"layers": layers, "tokens": tokens, "window": length},
        **{"weights": _digest(loaded.state_dict().values()), "text": _digest([text.row(_split(text))[:tokens]])},
        **{"document_separator": document_separator, "text_column": text_column},
    }
    folder = Path(output or f"{Path(model).resolve().name}-profile").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder / CELLS_FILE, str(folder)):
        done = _read_cells(folder / CELLS_FILE, options)
        places = {(cell.layer, cell.bond_dimension) for cell in done}
        missing = {place: form for place, form in forms.items() if place not in places}
        measure = _one_pass if metric == "output_error" else _one_at_a_time
        new = measure(loaded, text, missing, metric=metric, tokens=tokens)
        with (folder / CELLS_FILE).open("a", encoding="utf-8") as file:
            for cell in track(new, "Profiling", total=len(missing), transient=True):
                if not done:
                    # Not before: what fails without a cell leaves the folder for other options.
                    file.write(json.dumps(_stamp(options)) + "\n")
                file.write(json.dumps(asdict(cell)) + "\n")
                file.flush()
                done.append(cell)
        done.sort(key=lambda cell: (layers.index(cell.layer), cell.bond_dimension))
        write_profile(folder, options, done)
    print(f"{folder}: {len(done)} cells in profile.csv, profile.json and profile.png")


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


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stamp(options: dict[str, Any]) -> dict[str, str]:
    return {"options": hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()}


def _read_cells(path: Path, options: dict[str, Any]) -> list[Cell]:
    """Return the cells of an interrupted run; a line that it wrote only in part is cut off.

    Raises:
        FiftyfoldError: if the file is that of another profile.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        os.truncate(path, 0)
        return []
    try:
        first, *cells = [json.loads(line) for line in whole.splitlines()]
        found = [Cell(**cell) for cell in cells]
    except (ValueError, TypeError, RecursionError) as error:
        raise FiftyfoldError(f"{path} is damaged ({error}); delete it to begin anew.") from error
    if first != _stamp(options):
        raise FiftyfoldError(
            f"{path.parent} holds a profile of another model or text, or with other options; name another output "
            "folder, or delete that one."
        )
    for cell in found:
        ours = cell.layer in options["layers"] and cell.bond_dimension in options["bond_dimensions"]
        if not ours or not all(isinstance(number, float) for number in (cell.kept, cell.value, cell.change)):
            raise FiftyfoldError(f"{path} is damaged (at {cell.layer}); delete it to begin anew.")
    os.truncate(path, len(whole) if found else 0)
    return found
