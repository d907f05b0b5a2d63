"""Readers for the forms that GLUE's files come in: the original TSV, CSV, JSON lines, parquet.

GLUE's TSV files know no quoting: a quotation mark is an ordinary character, and only a line feed ends a row. Readers
with the usual defaults swallow rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from pyarrow import ArrowException

from fiftyfold.datamodules.glue_tasks import GLUETask
from fiftyfold.errors import FiftyfoldError

Row = tuple[int, Mapping[str, Any]]
"""A line number, counted from 1, and the line's fields by column."""

_JSON = json.JSONDecoder()
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FiftyfoldError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8."
        ) from error


def _read_tsv(path: Path, task: GLUETask) -> tuple[list[str], Iterator[Row]]:
    lines = _decode(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise FiftyfoldError(f"The file {path} is empty; put {task.name}'s rows into it or remove it.")
    header = lines[0].rstrip("\r").split("\t")
    is_header = any(name in header for names in task.text_columns for name in names)
    if not is_header and len(header) == len(task.headerless_columns):
        return list(task.headerless_columns), _tsv_rows(path, lines, list(task.headerless_columns), 0, task)
    return header, _tsv_rows(path, lines, header, 1, task)


def _tsv_rows(path: Path, lines: list[str], columns: list[str], start: int, task: GLUETask) -> Iterator[Row]:
    broken = 0
    for number, line in enumerate(lines[start:], start=start + 1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(columns):
            broken += 1
            if broken > task.broken_rows:
                raise FiftyfoldError(
                    f"{path}, line {number}: {len(fields)} fields separated by tabs where {len(columns)} are expected;"
                    " correct or remove the line."
                )
            continue
        yield number, dict(zip(columns, fields, strict=True))
    if broken:
        rank_zero_warn(f"{path}: passed over {broken} rows that do not have {len(columns)} fields.")


def _read_csv(path: Path, _task: GLUETask) -> tuple[list[str], Iterator[Row]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decode(path).rstrip(), newline=""), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise FiftyfoldError(f"{path}, line 1: not readable as CSV ({error}); correct the line.") from error
    return header, _csv_rows(path, reader, header)


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[Row]:
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise FiftyfoldError(
                f"{path}, line {reader.line_num}: not readable as CSV ({error}); check the quotation marks."
            ) from error
        if fields is None:
            return
        if not fields:
            continue
        if len(fields) != len(header):
            raise FiftyfoldError(
                f"{path}, line {reader.line_num}: {len(fields)} fields separated by commas where the header has"
                f" {len(header)}; correct or remove the line, or put the text into quotation marks."
            )
        yield reader.line_num, dict(zip(header, fields, strict=True))


def _read_json(path: Path, task: GLUETask) -> tuple[list[str], Iterator[Row]]:
    text = _decode(path)
    rows = _json_array(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    first = next(rows, None)
    if first is None:
        raise FiftyfoldError(f"The file {path} is empty; put {task.name}'s rows into it or remove it.")
    return list(first[1]), itertools.chain([first], rows)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record, end = _decode_json(path, number, line, _skip_space(line, 0))
            if rest := line[end:].strip():
                raise FiftyfoldError(f"{path}, line {number}: not JSON ({rest[0]!r} after its end); correct the line.")
            yield number, _json_record(path, number, record)


def _json_array(path: Path, text: str) -> Iterator[Row]:
    """Decode an array one record at a time, to know the line of each."""
    end, mark = _skip_space(text, 0), "["
    line = text.count("\n", 0, end) + 1
    while mark != "]":
        start = _skip_space(text, end + 1)
        line += text.count("\n", end, start)
        if mark == "[" and text[start : start + 1] == "]":
            return
        record, end = _decode_json(path, line, text, start)
        yield line, _json_record(path, line, record)
        end = _skip_space(text, end)
        line += text.count("\n", start, end)
        mark = text[end : end + 1]
        if mark not in {",", "]"}:
            raise FiftyfoldError(f"{path}, line {line}: not JSON (no comma after a record); correct the line.")
    if rest := text[end + 1 :].strip():
        raise FiftyfoldError(f"{path}, line {line}: not JSON ({rest[0]!r} after the array's end); correct the line.")


def _skip_space(text: str, start: int) -> int:
    found = _JSON_SPACE.match(text, start)
    return start if found is None else found.end()


def _decode_json(path: Path, line: int, text: str, start: int) -> tuple[Any, int]:
    try:
        return _JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise FiftyfoldError(f"{path}, line {line}: not JSON ({error.msg}); correct the line.") from error
    except (ValueError, RecursionError) as error:
        what = "a number of too many digits" if isinstance(error, ValueError) else "too many brackets inside brackets"
        raise FiftyfoldError(f"{path}, line {line}: {what}; correct or remove the line.") from error


def _json_record(path: Path, number: int, record: Any) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise FiftyfoldError(f"{path}, line {number}: not a JSON object with one field per column; correct the line.")
    return record


def _read_parquet(path: Path, _task: GLUETask) -> tuple[list[str], Iterator[Row]]:
    try:
        table = pyarrow.parquet.read_table(path)
        records = table.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise FiftyfoldError(f"{path} is not a readable parquet file ({error}); fetch or write it again.") from error
    return table.column_names, enumerate(records, start=1)


READERS: dict[str, Callable[[Path, GLUETask], tuple[list[str], Iterator[Row]]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""Returns a file's columns and rows, by the end of the file's name."""
