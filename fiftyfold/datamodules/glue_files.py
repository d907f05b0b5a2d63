"""Readers for GLUE's files: the original TSV, CSV, JSON lines, parquet.

GLUE's TSV files know no quoting: a quotation mark is an ordinary character, and only a line feed ends a row. Readers
with the usual defaults swallow rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from pyarrow import ArrowException

from fiftyfold.datamodules.glue_tasks import GLUETask
from fiftyfold.errors import FiftyfoldError

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
"""File forms that are read, by the end of the file's name."""

_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation", "valid", "val"),
    "validation_matched": ("dev_matched", "validation_matched", "dev", "validation", "valid", "val"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test", "diagnostic", "diagnostic-full"),
    "test_matched": ("test_matched", "test"),
    "test_mismatched": ("test_mismatched",),
}
_HIGHEST_SCORE = 5.0
_LONGEST_QUOTE = 60
_FIRST_SHARD = "-00000-of-"
_JSON = json.JSONDecoder()
_JSON_SPACE = re.compile(r"[ \t\n\r]*")

Row = tuple[int, Mapping[str, Any]]
"""A line number, counted from 1, and the line's fields by column."""


@dataclass
class Rows:
    """The rows of one split.

    Attributes:
        texts: one list of strings for single sentences, two of equal length for pairs.
        labels: class ids, or scores for a regression; None where the source has no labels.
    """

    texts: tuple[list[str], ...]
    labels: list[int] | list[float] | None

    def __len__(self) -> int:
        return len(self.texts[0])


def find_files(folder: str | Path, task: GLUETask) -> dict[str, Path]:
    """Find a task's files in a folder.

    Args:
        folder: GLUE's folder, which holds the task's one (``SST-2``, or ``sst2``), or the task's folder itself.
        task: the task.

    Returns:
        The file of every split that is there, by the split's name; of a split in several parquet files, as the hub
        stores GLUE, the first one.

    Raises:
        FiftyfoldError: if the folder does not exist, if it holds no file of the task, or if two files claim a split.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FiftyfoldError(
            f"The data folder {root} does not exist; give a folder that holds {task.folder}/train.tsv."
        )
    own = sorted(p for p in root.iterdir() if p.is_dir() and p.name.lower() in {task.folder.lower(), task.name})
    home = own[0] if own else root
    splits = (*task.train_splits, *task.validation_splits, *task.test_splits)
    found = {split: path for split in splits if (path := _find_split(home, split)) is not None}
    if not found:
        expected = ", ".join(f"{_STEMS[split][0]}.tsv" for split in splits)
        raise FiftyfoldError(
            f"The folder {home} holds none of {task.name}'s files; expected {expected}, or the same names ending in"
            f" {', '.join(SUFFIXES[1:])}."
        )
    return found


def _find_split(folder: Path, split: str) -> Path | None:
    for stem in _STEMS[split]:
        candidates = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
        candidates += sorted(folder.glob(f"{stem}{_FIRST_SHARD}?????.parquet"))
        if len(candidates) > 1:
            names = " and ".join(path.name for path in candidates)
            raise FiftyfoldError(f"The folder {folder} holds {names} for one split; keep the one that is meant.")
        if candidates:
            return candidates[0]
    return None


def file_shards(path: Path) -> list[Path]:
    """Return the files of a split in their order: ``x-00000-of-00003.parquet`` stands for all three.

    Raises:
        FiftyfoldError: if one is missing.
    """
    stem, mark, count = path.stem.partition(_FIRST_SHARD)
    if path.suffix != ".parquet" or not mark or not count.isdecimal():
        return [path]
    shards = [path.with_name(f"{stem}-{number:05d}-of-{count}.parquet") for number in range(max(1, int(count)))]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise FiftyfoldError(
            f"The file {missing[0]} does not exist, but {path.name} does; fetch all {int(count)} parts."
        )
    return shards


def read_file(path: str | Path, task: GLUETask, *, labelled: bool = True) -> Rows:
    """Read one file of a task, or one split in several parquet files.

    Args:
        path: a ``.tsv``, ``.csv``, ``.jsonl``, ``.json`` or ``.parquet`` file; see :func:`file_shards`.
        task: the task that the file belongs to.
        labelled: whether labels must be there. If not, a missing column, or a column of nothing but ``-1``, gives
            rows without labels.

    Raises:
        FiftyfoldError: if the file is missing, empty, not UTF-8, lacks a column, or holds a row of the wrong length or
            a label out of range; the message names the file and the line.
    """
    parts = [_read_shard(shard, task, labelled=labelled) for shard in file_shards(Path(path))]
    texts = tuple(list(itertools.chain(*column)) for column in zip(*(part.texts for part in parts), strict=True))
    labels: list[Any] = []
    for part in parts:
        if part.labels is None:
            return Rows(texts, None)
        labels += part.labels
    return Rows(texts, labels)


def _read_shard(path: Path, task: GLUETask, *, labelled: bool) -> Rows:
    if not path.is_file():
        raise FiftyfoldError(f"The file {path} does not exist; check the data folder.")
    if path.stat().st_size == 0:
        raise FiftyfoldError(f"The file {path} is empty; put {task.name}'s rows into it or remove it.")
    reader = {
        ".tsv": _read_tsv,
        ".csv": _read_csv,
        ".jsonl": _read_json,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix not in reader:
        raise FiftyfoldError(f"The file {path} is in no known form; its name must end in {', '.join(SUFFIXES)}.")
    columns, rows = reader[path.suffix](path, task)
    return rows_from_records(rows, columns, task, source=str(path), labelled=labelled)


def rows_from_records(
    records: Iterable[Row], columns: Iterable[str], task: GLUETask, *, source: str, labelled: bool
) -> Rows:
    """Turn records into a task's rows.

    Args:
        records: line numbers and fields by column.
        columns: the columns that the source has.
        task: the task.
        source: what to call the source in messages.
        labelled: see :func:`read_file`.

    Raises:
        FiftyfoldError: see :func:`read_file`.
    """
    columns = list(columns)
    text_columns = [_pick_column(names, columns, source, task) for names in task.text_columns]
    label_column = next((name for name in task.label_columns if name in columns), None)
    if label_column is None and labelled:
        _pick_column(task.label_columns, columns, source, task)
    texts: tuple[list[str], ...] = tuple([] for _ in text_columns)
    raw_labels: list[tuple[int, Any]] = []
    for line, record in records:
        for column, collected in zip(text_columns, texts, strict=True):
            collected.append(_parse_text(record.get(column), column, source, line))
        if label_column is not None:
            raw_labels.append((line, record.get(label_column)))
    if not texts[0]:
        raise FiftyfoldError(f"{source} holds no rows; put {task.name}'s rows into it or remove it.")
    if not labelled and all(str(label) in {"-1", "-1.0", "None", "-"} for _, label in raw_labels):
        return Rows(texts, None)
    return Rows(texts, [parse_label(label, task, source, line) for line, label in raw_labels])


def parse_label(raw: Any, task: GLUETask, source: str, line: int) -> int | float:
    """Turn what stands in a label's column into a class id or a score.

    Args:
        raw: a class's name or id, or a score, as text or as a number.
        task: the task.
        source: what to call the source in messages.
        line: the line's number for messages.

    Raises:
        FiftyfoldError: if it is neither.
    """
    text = type(raw).__name__ if isinstance(raw, list | dict) else str(raw).strip()
    quoted = repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…")
    if task.is_regression:
        score = _to_float(text)
        if not 0.0 <= score <= _HIGHEST_SCORE:
            raise FiftyfoldError(
                f"{source}, line {line}: the score {quoted} is not a number from 0 to 5; correct the line, or choose"
                f" the task that the file belongs to."
            )
        return score
    if text in task.label_names:
        return task.label_names.index(text)
    if text in map(str, range(task.num_labels)):
        return int(text)
    known = ", ".join(f"{index} ({name})" for index, name in enumerate(task.label_names))
    raise FiftyfoldError(
        f"{source}, line {line}: the label {quoted} is none of {task.name}'s: {known}; correct the line, or choose the"
        f" task that the file belongs to."
    )


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _parse_text(value: Any, column: str, source: str, line: int) -> str:
    if not isinstance(value, str):
        raise FiftyfoldError(f"{source}, line {line}: column {column!r} holds no text; correct or remove the line.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FiftyfoldError(
            f"{source}, line {line}: column {column!r} holds {value[error.start]!r}, half a character; correct or"
            " remove the line."
        ) from error
    return value.strip()


def _pick_column(names: tuple[str, ...], columns: list[str], source: str, task: GLUETask) -> str:
    for name in names:
        if name in columns:
            return name
    wanted = " or ".join(repr(name) for name in names)
    raise FiftyfoldError(
        f"{source} has no column {wanted}, which {task.name} needs; its columns are"
        f" {', '.join(repr(c) for c in columns)}: rename one, or choose the task that the file belongs to."
    )


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
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
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
