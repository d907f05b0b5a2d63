"""Documents for language models: from plain text, JSON lines or parquet files, or from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from pyarrow import ArrowException

from fiftyfold.datamodules.token_cache import file_digest
from fiftyfold.errors import FiftyfoldError, first_line

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
"""File forms that are read, by the end of the file's name."""

_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class TextSource:
    """The documents of one split.

    Attributes:
        name: how messages call it.
        digest: changes whenever the documents may have changed.
        read: yields the documents.
    """

    name: str
    digest: str
    read: Callable[[], Iterator[str]]


def find_sources(data: str, *, separator: str, column: str) -> dict[str, TextSource]:
    """Find the splits that ``data`` has: ``train``, ``validation``, ``test``.

    Args:
        data: a file, which is all training text; a folder with ``train``, and perhaps ``valid`` and ``test``,
            ``.txt``, ``.jsonl``, ``.json`` (an object a line) or ``.parquet``; or a hub id, with a configuration after
            a colon where there are several (``Salesforce/wikitext:wikitext-2-raw-v1``).
        separator: what stands between two documents of a ``.txt`` file; without it, the file is one document.
        column: where JSON objects, parquet files and the hub's sets have their text.

    Raises:
        FiftyfoldError: if there is nothing to read, or two files claim one split.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": _file_source(path, separator, column)}
    if path.is_dir():
        found = {split: file for split in _STEMS if (file := _find_split(path, split)) is not None}
        if "train" not in found and "validation" not in found and "test" not in found:
            forms = ", ".join(SUFFIXES)
            raise FiftyfoldError(f"{path} holds no text: name its files train, valid or test, with one of {forms}.")
        return {split: _file_source(file, separator, column) for split, file in found.items()}
    if path.is_absolute() or data.startswith((".", "~")) or path.suffix in SUFFIXES:
        raise FiftyfoldError(f"there is no text at {data}; name a file, a folder or a hub id.")
    return _hub_sources(data, column)


def read_documents(path: Path, *, separator: str, column: str) -> Iterator[str]:
    """Yield the documents of one file; empty ones are left out.

    Raises:
        FiftyfoldError: if the file cannot be read, or a record has no text.
    """
    if path.suffix == ".txt":
        texts: Iterable[Any] = _decode(path).split(separator) if separator else [_decode(path)]
    elif path.suffix == ".parquet":
        texts = _parquet_texts(path, column)
    elif path.suffix in SUFFIXES:
        texts = _json_texts(path, column)
    else:
        raise FiftyfoldError(f"{path} is not one of the forms that are read: {', '.join(SUFFIXES)}.")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise FiftyfoldError(f"{path}: the text of record {number} is {type(text).__name__}, not a string.")
        if stripped := text.strip("\n"):
            yield stripped


def _find_split(folder: Path, split: str) -> Path | None:
    candidates = [folder / f"{stem}{suffix}" for stem in _STEMS[split] for suffix in SUFFIXES]
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise FiftyfoldError(f"{folder} holds {names} for one split; keep the one that is meant.")
    return found[0] if found else None


def _file_source(path: Path, separator: str, column: str) -> TextSource:
    try:
        digest = file_digest(path)
    except OSError as error:
        raise FiftyfoldError(f"{path} cannot be read ({error.strerror}).") from error
    # Both decide what the documents are.
    digest = f"{digest}{path.suffix}/{separator}/{column}"
    return TextSource(str(path), digest, partial(read_documents, path, separator=separator, column=column))


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise FiftyfoldError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise FiftyfoldError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from error


def _json_texts(path: Path, column: str) -> Iterator[Any]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FiftyfoldError(f"{path}, line {number}: not a JSON object of its own ({error}).") from error
        if not isinstance(record, dict) or column not in record:
            raise FiftyfoldError(f"{path}, line {number}: has no {column!r}; name the text's column (text_column).")
        yield record[column]


def _parquet_texts(path: Path, column: str) -> Iterator[Any]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise FiftyfoldError(f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names)}.")
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise FiftyfoldError(f"{path} is no parquet file that can be read ({error}).") from error


def _hub_sources(data: str, column: str) -> dict[str, TextSource]:
    name, _, configuration = data.partition(":")
    try:
        splits = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise FiftyfoldError(
            f"the data set {data!r} cannot be fetched ({first_line(error)}); go online, or give a file or "
            "folder of your own."
        ) from error
    sources = {}
    for split, rows in splits.items():
        if column not in rows.column_names:
            raise FiftyfoldError(f"{data} has no column {column!r}, only {', '.join(rows.column_names)}.")
        sources[str(split)] = TextSource(
            f"{data} {split}", f"{rows._fingerprint}/{column}", partial(_column, rows, column)
        )
    return sources


def _column(rows: datasets.Dataset, column: str) -> Iterator[str]:
    return (text for text in rows[column] if text)
