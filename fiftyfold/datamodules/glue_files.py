"""A task's files: which there are in a folder, and the texts and labels that they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiftyfold.datamodules.glue_formats import READERS, Row
from fiftyfold.datamodules.glue_tasks import GLUETask
from fiftyfold.errors import FiftyfoldError

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
            f" {', '.join(list(READERS)[1:])}."
        )
    return found


def _find_split(folder: Path, split: str) -> Path | None:
    for stem in _STEMS[split]:
        candidates = [path for suffix in READERS if (path := folder / f"{stem}{suffix}").is_file()]
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


def read_file(path: str | Path, task: GLUETask, *, labelled: bool | None = True) -> Rows:
    """Read one file of a task, or one split in several parquet files.

    Args:
        path: a ``.tsv``, ``.csv``, ``.jsonl``, ``.json`` or ``.parquet`` file; see :func:`file_shards`.
        task: the task that the file belongs to.
        labelled: whether labels must be there. If not, a missing column, or a column of nothing but ``-1``, gives
            rows without labels; None does not read them where they are there, either.

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


def _read_shard(path: Path, task: GLUETask, *, labelled: bool | None) -> Rows:
    if not path.is_file():
        raise FiftyfoldError(f"The file {path} does not exist; check the data folder.")
    if path.stat().st_size == 0:
        raise FiftyfoldError(f"The file {path} is empty; put {task.name}'s rows into it or remove it.")
    if path.suffix not in READERS:
        raise FiftyfoldError(f"The file {path} is in no known form; its name must end in {', '.join(READERS)}.")
    columns, rows = READERS[path.suffix](path, task)
    return rows_from_records(rows, columns, task, source=str(path), labelled=labelled)


def rows_from_records(
    records: Iterable[Row], columns: Iterable[str], task: GLUETask, *, source: str, labelled: bool | None
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
    label_column = next((name for name in task.label_columns if name in columns and labelled is not None), None)
    if label_column is None and labelled:
        _pick_column(task.label_columns, columns, source, task)
    for name in (*text_columns, label_column):
        if name is not None and columns.count(name) > 1:
            raise FiftyfoldError(f"{source} has two columns {name!r}; rename the one that is not meant.")
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
