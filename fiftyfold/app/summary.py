"""The one table at the end of a compression, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One model in the table.

    Attributes:
        model: what it is.
        score: the task's selection metric on the development set, from 0 to 1 (correlations from -1).
        bytes_on_disk: size of its weights file; None for a model that was never written.
        parameters: number of parameters, a quantized one counted as one.
        latency_ms: median milliseconds for one batch, measured beside the other rows.
    """

    model: str
    score: float
    bytes_on_disk: int | None = None
    parameters: int | None = None
    latency_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


def print_table(rows: Sequence[Row], *, metric: str, title: str, console: Console | None = None) -> None:
    """Print the rows; what stands in brackets compares with the first, the teacher. Fits into 80 columns."""
    table = Table(title=title, title_justify="left", box=HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 0))
    for heading in ("", metric, "on disk", "parameters", "latency"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    teacher = rows[0]
    for row in rows:
        table.add_row(
            row.model,
            f"{row.score:.4f}"
            + (f" ({row.score / teacher.score:.1%})" if teacher.score > 0 and row is not teacher else ""),
            _compared(_bytes(row.bytes_on_disk), teacher.bytes_on_disk, row.bytes_on_disk),
            "-" if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
            _compared(
                "-" if row.latency_ms is None else f"{row.latency_ms:.1f} ms", teacher.latency_ms, row.latency_ms
            ),
        )
    (console or Console()).print(table)


def draw_picture(rows: Sequence[Row], *, metric: str, title: str, path: Path) -> None:
    """Draw score, size and latency of the rows, as far as they were measured, as bar charts in one PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    charts: list[tuple[Sequence[float | None], str, str]] = [
        ([row.score for row in rows], metric, "{:.3f}"),
        ([row.bytes_on_disk and row.bytes_on_disk / 1024 for row in rows], "weights on disk (KiB)", "{:,.0f}"),
        ([row.latency_ms for row in rows], "latency (ms a batch)", "{:.1f}"),
    ]
    measured = [chart for chart in charts if any(value is not None for value in chart[0])]
    for place, (values, label, form) in enumerate(measured, start=1):
        axes = figure.add_subplot(1, len(measured), place)
        _draw_bars(axes, [row.model for row in rows], values, label, form)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, names: Sequence[str], values: Sequence[float | None], label: str, form: str) -> None:
    shown = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    bars = axes.barh([name for name, _ in shown], [value for _, value in shown], color=_colors(len(shown)))
    axes.bar_label(bars, labels=[form.format(value) for _, value in shown], padding=3)
    axes.set_title(label)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colors(count: int) -> list[str]:
    return ["#5b6c7d", *["#c9ced4"] * max(count - 2, 0), "#d9622b"][:count]


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"


def _compared(text: str, teacher: float | None, own: float | None) -> str:
    return f"{text} ({teacher / own:.1f}x)" if teacher and own and teacher != own else text
