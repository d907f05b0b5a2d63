"""Tokenising a split once, and keeping the result for as long as its source stays the same."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from transformers import PreTrainedTokenizerBase

from fiftyfold.datamodules.glue_files import Rows, file_shards
from fiftyfold.errors import FiftyfoldError

_FORMAT_VERSION = 1
_TOKENIZER_BATCH = 1000


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; a touched file keeps its digest, an edited one never does.

    The first of several parquet files stands for all of them.
    """
    digests = []
    for shard in file_shards(path):
        with shard.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return "-".join(digests)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides which ids a tokenizer gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        # calls change these two, and every call of ours sets them
        content.pop("truncation", None)
        content.pop("padding", None)
    content["inputs"] = list(tokenizer.model_input_names)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_tokens(
    read: Callable[[], Rows],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_digest: str,
    task: str,
    split: str,
    max_length: int,
    cache_folder: Path,
) -> datasets.Dataset:
    """Return a split's tokens, from the cache if its source, tokenizer and length are those of a former run.

    A new entry is written beside the cache and moved into it by one rename. So a reader never sees half an entry, and
    of two processes that build the same entry the later one takes over the earlier one's.

    Args:
        read: reads the split; called only if the cache has no entry.
        tokenizer: the tokenizer.
        source_digest: digest of what ``read`` reads.
        task: the task's name.
        split: the split's name.
        max_length: longest input in tokens, special tokens included; what is longer is cut.
        cache_folder: the cache.

    Returns:
        Columns ``input_ids``, ``token_type_ids`` where the tokenizer gives them, and ``labels`` where there are any.

    Raises:
        FiftyfoldError: if the cache cannot be written, or if its entry cannot be read.
    """
    key = {
        "format": _FORMAT_VERSION,
        "source": source_digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "task": task,
        "split": split,
        "max_length": max_length,
    }

    def build() -> datasets.Dataset:
        return tokenize(read(), tokenizer, max_length=max_length, description=f"Tokenizing {task} {split}")

    return cached_dataset(build, key, name=f"{task}-{split}", cache_folder=cache_folder)


def cached_dataset(
    build: Callable[[], datasets.Dataset], key: dict[str, Any], *, name: str, cache_folder: Path
) -> datasets.Dataset:
    """Return what ``build`` makes, from the cache if the same was made before.

    Args:
        build: makes the entry.
        key: all that decides what ``build`` makes, as JSON values.
        name: what the entry's name begins with.
        cache_folder: the cache.

    Raises:
        FiftyfoldError: if the cache cannot be written, or if its entry cannot be read.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    entry = cache_folder / f"{name}-{digest}"
    if not entry.is_dir():
        _store(build(), entry)
    return open_cache_entry(entry)


def open_cache_entry(entry: Path) -> datasets.Dataset:
    """Open what a former run kept.

    Raises:
        FiftyfoldError: if the entry cannot be read.
    """
    try:
        tokens = datasets.load_from_disk(str(entry))
        # Arrow maps the file into memory and believes the offsets in it; a wrong one would end the process.
        tokens.data.table.validate(full=True)
        whole = tokens.column_names and tokens.features["input_ids"].feature.dtype.startswith("int")
    except PermissionError as error:
        raise FiftyfoldError(f"The cache's entry {entry} may not be read; give another cache_dir.") from error
    except Exception as error:  # datasets and Arrow raise whatever a damaged file makes them stumble over
        raise _damaged(entry) from error
    if not whole:
        raise _damaged(entry)
    return tokens


def _damaged(entry: Path) -> FiftyfoldError:
    return FiftyfoldError(f"The cache's entry {entry} is damaged; remove it and start again.")


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_length: int, description: str) -> datasets.Dataset:
    """Turn rows into tokens, in batches, with a progress bar. Nothing is padded.

    Args:
        rows: the texts and labels.
        tokenizer: the tokenizer. A truncation or padding set in its own file is overruled.
        max_length: longest input in tokens.
        description: what the progress bar says.
    """
    # A fast tokenizer remembers the truncation of its last call, and would carry it into an exported folder.
    tokenizer = copy.deepcopy(tokenizer)
    names = [f"text{index}" for index in range(len(rows.texts))]
    columns: dict[str, Any] = dict(zip(names, rows.texts, strict=True))
    if rows.labels is not None:
        columns["labels"] = rows.labels

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(
            *(batch[name] for name in names),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        return dict(encoded)

    return datasets.Dataset.from_dict(columns).map(
        encode, batched=True, batch_size=_TOKENIZER_BATCH, remove_columns=names, desc=description
    )


def _store(tokens: datasets.Dataset, entry: Path) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent)
        try:
            tokens.save_to_disk(temporary)
            _move(Path(temporary), entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise FiftyfoldError(
            f"The cache {entry.parent} cannot be written ({error.strerror or error}); free some space or give another"
            " cache_dir."
        ) from error


def _move(temporary: Path, entry: Path) -> None:
    try:
        temporary.rename(entry)
    except OSError:
        # another process was first
        if not entry.is_dir():
            raise


def token_lengths(tokens: datasets.Dataset) -> np.ndarray[Any, Any]:
    """Return the number of tokens of every example."""
    column = tokens.with_format("arrow")[:]["input_ids"]
    return np.asarray(pyarrow.compute.list_value_length(column))


class PaddingCollator:
    """Pads the examples of one batch to the longest of them.

    Args:
        pad_token_id: fills up ``input_ids``.
        regression: whether labels are scores.
        pad_left: whether the padding stands before the tokens.
    """

    def __init__(self, pad_token_id: int, *, regression: bool, pad_left: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.regression = regression
        self.pad_left = pad_left

    def __call__(self, examples: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        """Turn columns of lists into tensors ``[batch, longest]``, and ``labels`` into ``[batch]``."""
        ids = examples["input_ids"]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(row) for row in ids], 0),
        }
        if "token_type_ids" in examples:
            batch["token_type_ids"] = self._pad(examples["token_type_ids"], 0)
        if "labels" in examples:
            batch["labels"] = torch.tensor(examples["labels"], dtype=torch.float32 if self.regression else torch.int64)
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        longest = max(map(len, rows))
        padding = [[value] * (longest - len(row)) for row in rows]
        if self.pad_left:
            return torch.tensor([pad + row for pad, row in zip(padding, rows, strict=True)], dtype=torch.int64)
        return torch.tensor([row + pad for pad, row in zip(padding, rows, strict=True)], dtype=torch.int64)
