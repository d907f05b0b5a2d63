"""``fiftyfold benchmark``: how quick and how small an exported model is, beside what it replaces."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.measure import Measurement as Width
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from fiftyfold.app.contenders import Contender, LeftOut, build_contenders, check_lengths
from fiftyfold.app.latency import LARGEST_BATCH, measure_latency
from fiftyfold.errors import FiftyfoldError


@dataclass(frozen=True)
class Measurement:
    """One model's figures.

    Attributes:
        model: its name.
        weight_bytes: what its weights take in memory.
        latency_ms: by shape (``"8x128"``: sentences by tokens), median milliseconds of a forward pass.
        tokens_per_second: by shape.
    """

    model: str
    weight_bytes: int
    latency_ms: dict[str, float]
    tokens_per_second: dict[str, float]


def benchmark(
    folder: str,
    *,
    teacher: str | None = None,
    shapes: str = "1x8,1x128,8x128",
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = False,
    output: str | None = None,
) -> None:
    """Time a compressed model beside its teacher, bfloat16 and 8-bit peers.

    All are timed in turn, round by round, so that a slow moment of the machine meets all of them; figures in brackets
    compare with the first row.

    Args:
        folder: what `fiftyfold compress`, `fiftyfold export` or fiftyfold.export wrote.
        teacher: the model it replaces, a folder or hub id; by default the model itself with dense float32 weights.
        shapes: sizes of a batch as SENTENCESxTOKENS, with commas between.
        threads: threads of the CPU; torch's choice if left out.
        device: cpu or cuda.
        compile: time it and what it replaces as `fiftyfold compile` makes them too; that takes a minute or some.
        output: a JSON file to write the figures to; must not exist.
    """
    sizes = [_parse(shape.strip()) for shape in shapes.split(",")]
    if output is not None:
        _check_output(Path(output))
    if device == "cuda" and not torch.cuda.is_available():
        raise FiftyfoldError("torch finds no CUDA GPU here; leave --device out.")
    if threads is not None and threads < 1:
        raise FiftyfoldError(f"threads must be at least 1, not {threads}.")
    check_lengths(folder, teacher, max(tokens for _, tokens in sizes))
    if threads is not None:
        torch.set_num_threads(threads)
    measurements, left_out = measure(folder, teacher, sizes, device, compiled=compile)
    show(measurements, left_out, title=f"{folder}, {device}, {torch.get_num_threads()} threads")
    if output is not None:
        Path(output).write_text(json.dumps(describe(measurements, left_out, device), indent=2) + "\n", encoding="utf-8")


def measure(
    folder: str, teacher: str | None, sizes: Sequence[tuple[int, int]], device: str, *, compiled: bool = False
) -> tuple[list[Measurement], list[LeftOut]]:
    """Build and time the models, with a progress bar.

    Returns:
        The figures, the exported model's last, compiled if it was compiled, and the models that could not be measured.
    """
    contenders: list[Contender] = []
    left_out: list[LeftOut] = []
    latencies: dict[str, dict[str, float]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("building the models", total=5 + 2 * compiled + len(sizes))
        for built in build_contenders(folder, teacher, device, compiled=compiled):
            (contenders if isinstance(built, Contender) else left_out).append(built)  # type: ignore[arg-type]
            progress.update(task, advance=1, description=f"built {built.name}")
        models = {contender.name: contender.model for contender in contenders}
        entries = smallest_vocabulary(models.values())
        for size in sizes:
            progress.update(task, description=f"timing {size[0]} x {size[1]} tokens")
            latencies[_name(size)] = measure_latency(models, random_batch(entries, size, device))
            progress.advance(task)
    return [_measurement(contender, latencies, sizes) for contender in contenders], left_out


def smallest_vocabulary(models: Iterable[nn.Module]) -> int:
    """Return how many tokens all models know: the exported one's vocabulary may have been trimmed."""
    known = [model.config.get_text_config().vocab_size for model in models if isinstance(model, PreTrainedModel)]
    return int(min(known))


def random_batch(entries: int, size: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    """Return sentences of random tokens below ``entries`` without padding, the same every time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(entries, size, generator=generator)
    return {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}


def show(measurements: Sequence[Measurement], left_out: Sequence[LeftOut], title: str) -> None:
    """Print the table; what stands in brackets compares with the first row."""
    first = measurements[0]
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for heading in ("weights", *(f"{shape}, ms" for shape in first.latency_ms), "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in measurements:
        times = [
            f"{time:.2f}" + ("" if row is first else f" ({first.latency_ms[shape] / time:.1f}x)")
            for shape, time in row.latency_ms.items()
        ]
        weights = f"{row.weight_bytes / 2**20:.1f} MiB"
        table.add_row(row.model, weights, *times, f"{max(row.tokens_per_second.values()):,.0f}")
    console = Console()
    # Where no terminal tells its width, rich takes 80 columns, and would cut the figures to fit.
    wanted = Width.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, wanted)
    console.print(table)
    for absent in left_out:
        console.print(f"{absent.name} is left out: {absent.reason}", highlight=False, soft_wrap=True)


def describe(measurements: Sequence[Measurement], left_out: Sequence[LeftOut], device: str) -> dict[str, Any]:
    """Return the figures and what they were measured on, as JSON values."""
    return {
        "machine": processor_name(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "models": [asdict(row) for row in measurements],
        "left_out": [asdict(row) for row in left_out],
    }


def processor_name() -> str:
    """Return what the processor calls itself, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _measurement(
    contender: Contender, latencies: dict[str, dict[str, float]], sizes: Sequence[tuple[int, int]]
) -> Measurement:
    times = {shape: found[contender.name] for shape, found in latencies.items()}
    tokens = {_name(size): size[0] * size[1] for size in sizes}
    rates = {shape: 1000 * tokens[shape] / time for shape, time in times.items()}
    return Measurement(contender.name, contender.weight_bytes(), times, rates)


def _check_output(file: Path) -> None:
    """Refuse a place for the figures before they are measured, which takes minutes."""
    if file.exists():
        raise FiftyfoldError(f"{file} exists already; name another file.")
    if not file.parent.is_dir():
        raise FiftyfoldError(f"there is no folder {file.parent} to write {file.name} to.")


def _parse(shape: str) -> tuple[int, int]:
    rows, cross, columns = shape.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise FiftyfoldError(f"a shape is SENTENCESxTOKENS, such as 8x128, not {shape!r}.")
    if int(rows) > LARGEST_BATCH:
        raise FiftyfoldError(f"a batch has at most {LARGEST_BATCH} sentences here, not {rows}.")
    return int(rows), int(columns)


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
