"""Time and peak memory of decomposing one matrix of a 7B model in the metric of its inputs.

The matrix has a power-law spectrum, the second moment of the inputs too, over random directions; only their sizes
matter to the time. Each form runs in a process of its own, whose largest resident size is the peak memory.

    python benchmarks/large_matrices.py
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fiftyfold.modules.tensor_network.decomposition import rebuild
from fiftyfold.modules.tensor_network.families import Family, form_of_family
from fiftyfold.modules.tensor_network.gauge import fix_gauge
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.solvers import solve

KEEP = 0.3
CASES: tuple[tuple[int, int, Family, int], ...] = (
    (4096, 4096, "svd", 0),
    (11008, 4096, "svd", 0),
    (4096, 4096, "sum20", 1),
)
RESULT = Path(__file__).parent / "results" / "large_matrices.json"


def main() -> None:
    """Measure each case in a process of its own, or the one that the arguments name."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows = []
    for index in range(len(CASES)):
        done = subprocess.run([sys.executable, __file__, str(index)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().split("\n")[-1]))
        print(rows[-1], flush=True)
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        RESULT.write_text(json.dumps({**machine, "cases": rows}, indent=1) + "\n", encoding="utf-8")


def measure(index: int) -> dict[str, Any]:
    """Return what one case took."""
    rows, columns, family, sweeps = CASES[index]
    torch.manual_seed(0)
    matrix = torch.randn(rows, columns) / columns**0.5 * torch.arange(1, columns + 1).pow(-0.3)
    samples = torch.randn(2 * columns, columns) * torch.arange(1, columns + 1).flip(0).pow(-0.5)
    moment = samples.T @ samples / len(samples)
    del samples
    form = form_of_family((rows, columns), family, KEEP * 2 * rows * columns, 16)
    assert form is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, begin_cpu = time.perf_counter(), time.process_time()
    metric = Metric(moment)
    networks = solve(matrix, form, metric, sweeps)
    solved = time.perf_counter() - begin
    fixed = [fix_gauge(cores)[0] for cores in networks]
    seconds = time.perf_counter() - begin
    approximation = sum(rebuild(cores)[:rows, :columns] for cores in fixed)
    assert isinstance(approximation, torch.Tensor)
    return {
        "shape": [rows, columns],
        "family": family,
        "sweeps": sweeps,
        "seconds": round(seconds, 1),
        "of which the gauge": round(seconds - solved, 1),
        "processor seconds": round(time.process_time() - begin_cpu, 1),
        "peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "GiB before": round(before / 2**20, 2),
        "relative error": round(metric.relative_error(matrix, approximation), 4),
    }


if __name__ == "__main__":
    main()
