"""Documents as tokens, and tokens as sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fiftyfold.datamodules.text_files import TextSource
from fiftyfold.datamodules.token_cache import cached_dataset, tokenizer_digest
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.pretrained import Objective
from fiftyfold.modules.text_module import IGNORED_LABEL

_FORMAT_VERSION = 1
_LONGEST_PIECE = 2**20
_DOCUMENTS_A_CALL = 256

Tokens = np.ndarray[Any, np.dtype[np.int32]]


def tokenize_documents(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, *, split: str, cache_folder: Path
) -> list[Tokens]:
    """Return the tokens of every document, without special tokens, from the cache if nothing has changed.

    Documents of more than a million characters are tokenised in pieces that end with a line.

    Raises:
        FiftyfoldError: if there is no text, or the cache cannot be written.
    """
    key = {
        "format": _FORMAT_VERSION,
        "kind": "documents",
        "source": source.digest,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    documents = cached_dataset(
        lambda: _tokenize(source, tokenizer), key, name=f"text-{split}", cache_folder=cache_folder
    )
    chunks = documents.with_format("arrow")[:]["input_ids"].chunks
    found = [
        chunk.values[start.as_py() : end.as_py()].to_numpy()
        for chunk in chunks
        for start, end in zip(chunk.offsets[:-1], chunk.offsets[1:], strict=True)
    ]
    if not found:
        raise FiftyfoldError(f"{source.name} holds no text.")
    return found


def join_documents(documents: list[Tokens], tokenizer: PreTrainedTokenizerBase, objective: Objective) -> Tokens:
    """Return all documents in one row of tokens, with a mark between them.

    For a causal model each begins with the tokenizer's beginning token, or, where there is none, ends with its end
    token; for a masked one each ends with its separator.
    """
    if objective == "masked":
        before, after = None, tokenizer.sep_token_id
    else:
        before = tokenizer.bos_token_id
        after = tokenizer.eos_token_id if before is None else None
    marks = [np.array([] if mark is None else [mark], dtype=np.int32) for mark in (before, after)]
    return np.concatenate([part for document in documents for part in (marks[0], document, marks[1])])


class PackedSequences:
    """Sequences of one length, cut from a row of tokens; a rest that fills none is left out.

    An index beyond the last sequence means the same sequence in a later epoch, so that what is drawn for it can differ.

    Args:
        tokens: the row.
        length: tokens a sequence, ``prefix`` and ``suffix`` included.
        prefix: tokens that begin every sequence.
        suffix: tokens that end every sequence.
    """

    def __init__(
        self, tokens: Tokens, length: int, prefix: list[int] | None = None, suffix: list[int] | None = None
    ) -> None:
        self.prefix, self.suffix = (np.array(ids or [], dtype=np.int64) for ids in (prefix, suffix))
        content = length - len(self.prefix) - len(self.suffix)
        if content < 1:
            raise FiftyfoldError(f"a sequence of {length} tokens has no room for text; make sequence_length larger.")
        count = len(tokens) // content
        self.contents = tokens[: count * content].reshape(count, content)

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, indices: list[int], /) -> tuple[list[int], torch.Tensor]:
        """Return the indices, and their sequences [batch, length]."""
        rows = self.contents[np.asarray(indices) % len(self)].astype(np.int64)
        edges = [np.broadcast_to(edge, (len(rows), len(edge))) for edge in (self.prefix, self.suffix)]
        return indices, torch.from_numpy(np.concatenate([edges[0], rows, edges[1]], axis=1))

    def part(self, rows: np.ndarray[Any, Any] | slice) -> PackedSequences:
        """Return some of the sequences."""
        chosen = object.__new__(PackedSequences)
        chosen.prefix, chosen.suffix, chosen.contents = self.prefix, self.suffix, self.contents[rows]
        return chosen


def causal_batch(rows: tuple[list[int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``labels``, the same [batch, length]; a causal model shifts the labels itself."""
    _, tokens = rows
    return {"input_ids": tokens, "labels": tokens}


class MaskingCollator:
    """Hides tokens for a masked model to fill in: 80 % become the mask, 10 % another token, 10 % stay (BERT).

    Which ones is a function of the seed and the sequence's index alone.

    Args:
        tokenizer: has a mask token.
        share: share of the tokens that are to be predicted.
        seed: fixes the choice.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, seed: int) -> None:
        self.mask_token = tokenizer.mask_token_id
        self.vocabulary = len(tokenizer)
        self.special = np.array(tokenizer.all_special_ids)
        self.share = share
        self.seed = seed

    def __call__(self, rows: tuple[list[int], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` [batch, length], the labels -100 where nothing is to be predicted."""
        indices, tokens = rows
        hidden = [self._hide(index, row) for index, row in zip(indices, tokens.numpy(), strict=True)]
        inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*hidden, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def _hide(self, index: int, row: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        generator = np.random.default_rng((self.seed, index))
        eligible = np.flatnonzero(~np.isin(row, self.special))
        count = min(len(eligible), max(1, round(self.share * len(eligible))))
        chosen = generator.choice(eligible, count, replace=False)
        inputs, labels = row.copy(), np.full_like(row, IGNORED_LABEL)
        labels[chosen] = row[chosen]
        fate = generator.random(count)
        inputs[chosen[fate < 0.8]] = self.mask_token
        other = chosen[fate >= 0.9]
        inputs[other] = generator.integers(self.vocabulary, size=len(other))
        return inputs, labels


def _tokenize(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    documents: list[Tokens] = []
    waiting: list[str] = []
    progress = tqdm(desc=f"Tokenizing {source.name}", unit=" documents", leave=False)

    def encode() -> None:
        pieces = [list(_pieces(text)) for text in waiting]
        encoded = iter(
            tokenizer(
                [piece for parts in pieces for piece in parts],
                add_special_tokens=False,
                truncation=False,
                padding=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        )
        documents.extend(np.concatenate([np.array(next(encoded), np.int32) for _ in parts]) for parts in pieces)
        progress.update(len(waiting))
        waiting.clear()

    for text in source.read():
        waiting.append(text)
        if len(waiting) == _DOCUMENTS_A_CALL or len(text) > _LONGEST_PIECE:
            encode()
    if waiting:
        encode()
    progress.close()
    if not documents:
        raise FiftyfoldError(f"{source.name} holds no text.")
    return datasets.Dataset.from_dict(
        {"input_ids": documents},
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
    )


def _pieces(text: str) -> Iterator[str]:
    """Cut a text after line ends into pieces of bounded length, as far as its lines allow."""
    start = 0
    while len(text) - start > _LONGEST_PIECE:
        end = text.rfind("\n", start, start + _LONGEST_PIECE) + 1
        end = end if end > start else start + _LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]
