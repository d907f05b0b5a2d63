from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fiftyfold.app.summary import Row, draw_picture, print_table

ROWS = [
    Row("teacher", 0.9, 4 * 2**20, 1_000_000, 20.0),
    Row("teacher cut to W1A8", 0.45),
    Row("student W1A8", 0.81, 80 * 1024, 600_000, 10.0),
]


def printed(rows: list[Row]) -> list[str]:
    stream = io.StringIO()
    print_table(rows, metric="accuracy", title="out", console=Console(file=stream, width=80))
    return stream.getvalue().splitlines()


def test_the_table_compares_with_the_teacher() -> None:
    student = next(line for line in printed(ROWS) if "student" in line)
    for figure in ("0.8100 (90.0%)", "80.0 KiB (51.2x)", "0.6 M", "10.0 ms (2.0x)"):
        assert figure in student


def test_the_table_fits_into_80_columns_uncut() -> None:
    widest = [Row("teacher cut to W1A8", 0.93711, 437_958_648, 109_482_240, 1234.5)] * 2
    lines = printed([*widest, Row("student W1A8", 0.9, 14_000_000, 109_482_240, 600.0)])
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)


def test_a_teacher_that_scores_nothing_is_no_division_by_zero() -> None:
    assert any("0.0000" in line for line in printed([Row("teacher", 0.0), Row("student", 0.1)]))


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw_picture(ROWS, metric="accuracy", title="out", path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
