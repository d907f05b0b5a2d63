"""What a word may be replaced with: synonyms, neighbours in an embedding, a masked language model's guesses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fiftyfold.errors import FiftyfoldError, first_line

STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are aren as at be because been before being below between both
    but by can cannot could couldn d did didn do does doesn doing don down during each either else ever every few for
    from further had hadn has hasn have haven having he her here hers herself him himself his how i if in into is isn
    it its itself just ll m may me might mightn more most must mustn my myself needn neither no nor not now o of off on
    once one only or other our ours ourselves out over own per re s same shall shan she should shouldn since so some
    such t than that the their theirs them themselves then there these they this those though through till to too
    under unless until up upon us ve very was wasn we were weren what when where whether which while who whom whose
    why will with within without won would wouldn y yes yet you your yours yourself yourselves
    """.split()
)
"""Words that carry grammar rather than meaning; they are never replaced."""

_SPLITTER = BertPreTokenizer()
_SEARCH_CHUNK = 1024
_MASKED_BATCH = 64

Span = tuple[int, int]
"""First character of a word in its text, and the one after its last."""


def replaceable_words(text: str) -> list[Span]:
    """Find the words that may be replaced: alphabetic, no stop words; split at blanks and punctuation, as BERT does."""
    spans = (span for _, span in _SPLITTER.pre_tokenize_str(text))
    return [(s, e) for s, e in spans if text[s:e].isalpha() and text[s:e].lower() not in STOP_WORDS]


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Read a list of synonyms: two words separated by a blank on each line, good in both directions.

    Returns:
        For each word its synonyms, in the order of the file.

    Raises:
        FiftyfoldError: if the file is missing, or a line does not hold two words.
    """
    path = Path(path)
    if not path.is_file():
        raise FiftyfoldError(f"The list of synonyms {path} does not exist; check its name.")
    found: dict[str, dict[str, None]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FiftyfoldError(f"The list of synonyms {path} is not UTF-8; save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        words = line.lower().split()
        if not words:
            continue
        if len(words) != 2:
            raise FiftyfoldError(
                f"{path}, line {number}: {len(words)} words where two are expected, a word and its synonym; correct or"
                " remove the line."
            )
        if words[0] != words[1]:
            found.setdefault(words[0], {})[words[1]] = None
            found.setdefault(words[1], {})[words[0]] = None
    if not found:
        raise FiftyfoldError(
            f"The list of synonyms {path} is empty; give one with a word and its synonym on each line."
        )
    return {word: list(synonyms) for word, synonyms in found.items()}


def nearest_rows(queries: torch.Tensor, matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Find the nearest rows by cosine, some thousand queries at a time.

    Args:
        queries: ``[queries, width]``.
        matrix: ``[rows, width]``.
        count: how many to find; at most ``rows``.

    Returns:
        Row numbers ``[queries, count]``, nearest first.
    """
    targets = nn.functional.normalize(matrix.float(), dim=1).T
    chunks = nn.functional.normalize(queries.float(), dim=1).split(_SEARCH_CHUNK)
    return torch.cat([(chunk @ targets).topk(min(count, len(matrix)), dim=1).indices for chunk in chunks])


class EmbeddingNeighbours:
    """Looks up the words nearest to a word in a model's word embedding.

    Candidates are the vocabulary's whole words. A word of several pieces is looked up by the mean of its pieces.

    Args:
        model: a folder or a hub id of a model with its tokenizer.
    """

    def __init__(self, model: str) -> None:
        loaded, self._tokenizer = _load(AutoModel, model)
        self._matrix = loaded.get_input_embeddings().weight.detach()
        self.digest = model_digest(loaded.get_input_embeddings(), self._tokenizer)
        self._words, rows = _whole_words(self._tokenizer, len(self._matrix))
        if not self._words:
            raise FiftyfoldError(f"The vocabulary of {model} holds no whole words to replace others with.")
        self._word_matrix = self._matrix[rows]

    def find(self, words: Sequence[str], count: int) -> dict[str, list[str]]:
        """Return up to ``count`` neighbours of each word, nearest first; none for a word of unknown pieces."""
        known, vectors = [], []
        pieces = self._tokenizer(list(words), add_special_tokens=False)["input_ids"] if words else []
        for word, ids in zip(words, pieces, strict=True):
            if ids and self._tokenizer.unk_token_id not in ids:
                known.append(word)
                vectors.append(self._matrix[ids].mean(0))
        if not known:
            return {}
        # one more, for the word itself
        nearest = nearest_rows(torch.stack(vectors), self._word_matrix, count + 1).tolist()
        return {
            word: [self._words[row] for row in rows if self._words[row] != word][:count]
            for word, rows in zip(known, nearest, strict=True)
        }


class MaskedLanguageModel:
    """Guesses words from their context (TinyBERT, section 3.3).

    The text with one word masked is the first sequence, the whole text the second. Only words of one piece are masked.
    All the passes of one text are batches of their own, so that a guess never hangs on what else is augmented.

    Args:
        model: a folder or a hub id of a masked language model with its tokenizer.
    """

    def __init__(self, model: str) -> None:
        self._model, self._tokenizer = _load(AutoModelForMaskedLM, model)
        self._model.eval()
        if self._tokenizer.mask_token_id is None:
            raise FiftyfoldError(f"The tokenizer of {model} has no mask token; give a masked language model.")
        self.digest = model_digest(self._model, self._tokenizer)

    def find(self, text: str, spans: Sequence[Span], count: int) -> dict[Span, list[str]]:
        """Return the most likely words for those of the given words that are one piece.

        Args:
            text: the sentence.
            spans: the words to mask in turn.
            count: how many pieces to take; those that are no whole words are dropped afterwards.
        """
        longest = min(self._model.config.max_position_embeddings, self._tokenizer.model_max_length)
        encoded = self._tokenizer(
            text,
            text,
            truncation=True,
            max_length=longest,
            padding=False,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping")[0].tolist()
        first = {
            tuple(offset): place
            for place, (offset, part) in enumerate(zip(offsets, encoded.sequence_ids(0), strict=True))
            if part == 0
        }
        known = [span for span in spans if span in first]
        places = torch.tensor([first[span] for span in known])
        found: dict[Span, list[str]] = {}
        for start in range(0, len(known), _MASKED_BATCH):
            chunk = places[start : start + _MASKED_BATCH]
            for span, ids in zip(known[start:], self._guess(dict(encoded), chunk, count), strict=False):
                found[span] = self._to_words(ids)
        return found

    @torch.inference_mode()
    def _guess(self, encoded: dict[str, torch.Tensor], places: torch.Tensor, count: int) -> list[list[int]]:
        batch = {name: tensor.repeat(len(places), 1) for name, tensor in encoded.items()}
        rows = torch.arange(len(places))
        batch["input_ids"][rows, places] = self._tokenizer.mask_token_id
        logits = self._model(**batch).logits[rows, places]
        return logits.topk(min(count, logits.shape[-1])).indices.tolist()  # type: ignore[no-any-return]

    def _to_words(self, ids: list[int]) -> list[str]:
        special = set(self._tokenizer.all_special_tokens)
        tokens = [token for token in self._tokenizer.convert_ids_to_tokens(ids) if token not in special]
        return [word for token in tokens if (word := token.lstrip("Ġ▁")).isalpha()]


def merge_candidates(sources: Iterable[Sequence[str]], word: str, count: int) -> list[str]:
    """Join candidates of several sources, the first source's first, without the word itself and without repeats."""
    merged = dict.fromkeys(candidate for source in sources for candidate in source)
    merged.pop(word, None)
    return list(merged)[:count]


def match_case(candidate: str, word: str) -> str:
    """Write a candidate in capitals as the word is that it replaces."""
    if word.islower():
        return candidate
    if word.isupper() and len(word) > 1:
        return candidate.upper()
    return candidate.capitalize() if word[0].isupper() else candidate


def model_digest(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a model's weights and its tokenizer's vocabulary."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token} {index}\n".encode())
    return digest.hexdigest()


def _whole_words(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items() if index < rows}
    marks_pieces = any(token.startswith("##") for token in vocabulary.values())
    words: dict[str, int] = {}
    for index, token in sorted(vocabulary.items()):
        word = token if marks_pieces else token[1:] if token[:1] in {"Ġ", "▁"} else ""
        if len(word) > 1 and word.isalpha():
            words.setdefault(word, index)
    return list(words), list(words.values())


def _load(auto_class: Any, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    verbosity = logging.get_verbosity()
    # a head that is missing or left over says nothing about the embedding
    logging.set_verbosity_error()
    try:
        return auto_class.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FiftyfoldError(
            f"No model with a tokenizer could be loaded from {name!r} for augmentation ({first_line(error)});"
            " give a folder or a hub id."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
