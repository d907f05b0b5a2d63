"""How small the model file becomes: BERT-base's configuration with 12, 6 and 5 layers at 1 and 2 bits.

The weights are random: the size of the file does not depend on training. The yardstick is the file that transformers
writes for the 12-layer model in float32, as measured. Run it from anywhere:

    python benchmarks/size.py

It prints a table and writes ``results/size.json`` beside itself. Three configurations are compared:

* ``default``: fiftyfold's. Beyond the modules that XTC quantizes it packs the pooler and the position and token-type
  embeddings; biases, layer normalizations, the classifier and the scales are float16.
* ``xtc, rest float16``: XTC's modules are packed, everything else is float16.
* ``xtc, rest float32``: XTC's own configuration, honestly packed: everything else stays float32.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from fiftyfold.kernels.path import use_path
from fiftyfold.modules import export, quantize, reduce_layers
from fiftyfold.modules.packed.manifest import RestDtype
from fiftyfold.modules.quantization.quantize import XTC_SETTINGS, QuantizeArguments

RESULTS = Path(__file__).parent / "results" / "size.json"
LAYERS = {12: None, 6: [1, 3, 5, 7, 9, 11], 5: [2, 4, 6, 8, 10]}
BITS = (1, 2)
REQUIRED = {12: 30.0, 6: 50.0, 5: 55.0}
"""What the default configuration must reach at 1 bit."""


@dataclass(frozen=True)
class Configuration:
    """What to pack, and in which type the rest is stored."""

    name: str
    xtc: bool
    rest_dtype: RestDtype


CONFIGURATIONS = (
    Configuration("default", xtc=False, rest_dtype="float16"),
    Configuration("xtc, rest float16", xtc=True, rest_dtype="float16"),
    Configuration("xtc, rest float32", xtc=True, rest_dtype="float32"),
)


def main() -> None:
    """Measure every cell, print the table, write the results."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig()).eval()
    with tempfile.TemporaryDirectory() as folder, use_path("reference"):
        teacher.save_pretrained(folder)
        reference = (Path(folder) / "model.safetensors").stat().st_size
        cells = [
            measure(teacher, reference, layers, bits, configuration, Path(folder) / f"{layers}-{bits}-{index}")
            for layers in LAYERS
            for bits in BITS
            for index, configuration in enumerate(CONFIGURATIONS)
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"float32_file_bytes": reference, "cells": cells}, indent=2) + "\n")
    print(table(reference, cells))
    for cell in cells:
        if cell["configuration"] == "default" and cell["weight_bits"] == 1:
            assert cell["ratio"] >= REQUIRED[cell["layers"]], cell


def measure(
    teacher: PreTrainedModel, reference: int, layers: int, bits: int, configuration: Configuration, folder: Path
) -> dict[str, Any]:
    """Compress a copy of ``teacher``, export it, and return what lies on the disk."""
    model = copy.deepcopy(teacher)
    if (kept := LAYERS[layers]) is not None:
        reduce_layers(model, layers=kept)
    settings: QuantizeArguments = {**XTC_SETTINGS} if configuration.xtc else {}
    settings["weight_bits"] = bits
    quantize(model, **settings)
    report = export(model, folder, rest_dtype=configuration.rest_dtype)
    return {
        "layers": layers,
        "weight_bits": bits,
        "configuration": configuration.name,
        "file_bytes": report.file_bytes,
        "ratio": round(reference / report.file_bytes, 2),
        "ideal_ratio": None if report.ideal_ratio is None else round(report.ideal_ratio, 2),
        "part_bytes": report.part_bytes,
        "beyond_xtc": report.beyond_xtc,
        "outputs_equal": report.outputs_equal,
    }


def table(reference: int, cells: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"float32 file of the 12-layer model: {reference:,} bytes",
        "",
        "| layers | weights | configuration | file, bytes | times smaller |",
        "|---:|---:|---|---:|---:|",
    ]
    lines += [
        f"| {cell['layers']} | {cell['weight_bits']} bit | {cell['configuration']} "
        f"| {cell['file_bytes']:,} | {cell['ratio']:.1f} |"
        for cell in cells
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
