"""Whole models on a CPU: BERT-base's encoder and MiniLM's, packed, beside float32, bfloat16 and 8-bit peers.

Weights are random: time does not depend on them. All models are timed in turn, round by round, in one process, by what
``fiftyfold benchmark`` times with. For example:

    python benchmarks/whole_model.py bert-base --threads 1
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

import fiftyfold
from fiftyfold.app.benchmark import describe, measure, show
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.modules import quantize

RESULTS = Path(__file__).parent / "results" / "whole_model.json"
CONFIGURATIONS = {
    "bert-base": BertConfig(),
    "minilm-l6": BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536, num_attention_heads=12),
}
SIZES = [(1, 8), (1, 128), (8, 128)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGURATIONS)
    parser.add_argument("--bits", type=int, default=1, choices=(1, 2))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="time both as `fiftyfold compile` makes them too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = BertModel(CONFIGURATIONS[arguments.model])
    quantize(model, weight_bits=arguments.bits)
    with tempfile.TemporaryDirectory() as folder:
        fiftyfold.export(model, Path(folder) / "small")
        measurements, left_out = measure(str(Path(folder) / "small"), None, SIZES, "cpu", compiled=arguments.compile)
    show(measurements, left_out, title=f"{arguments.model}, W{arguments.bits}A8, {arguments.threads} threads")
    library = cpu_status().library
    row: dict[str, Any] = {
        "model": arguments.model,
        "bits": arguments.bits,
        "compiled": arguments.compile,
        "path": "torch" if library is None else library.path(),
        **describe(measurements, left_out, "cpu"),
    }
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    same = ("model", "bits", "compiled", "path", "threads", "machine")
    kept = [old for old in kept if any(old[name] != row[name] for name in same)]
    RESULTS.write_text(json.dumps([*kept, row], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
