"""Which tokens texts need, and the texts of their kind that are not there."""

from __future__ import annotations

import copy
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 1000
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

Pair = tuple[str, str]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield each text's tokens, special ones included, whatever its length."""
    tokenizer = copy.deepcopy(tokenizer)  # a fast one remembers the truncation of its last call
    left = iter(texts)
    while batch := list(islice(left, _TEXTS_AT_ONCE)):
        yield from tokenizer(batch, truncation=False, padding=False, verbose=False)["input_ids"]


def needed_tokens(tokenizer: PreTrainedTokenizerBase, definition: Mapping[str, Any], wanted: Iterable[int]) -> set[int]:
    """Return the tokens that cut texts as before, and other texts into smaller pieces rather than unknown ones.

    These are the wanted ones; special and added ones; the characters that the wanted ones have or ASCII has, and all
    bytes where a tokenizer knows bytes; and what merging the kept ones passes through.

    Args:
        tokenizer: a fast one.
        definition: its ``tokenizer.json``.
        wanted: the texts' tokens, and others that must stay; numbers that are no token's are passed over.
    """
    names: dict[str, int] = tokenizer.get_vocab()
    by_number = {number: name for name, number in names.items()}
    used = by_number.keys() & wanted
    kept = used | {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    characters = set(string.printable).union(*(by_number[number] for number in used))
    prefix, suffix = (definition["model"].get(name) or "" for name in _AFFIXES)
    all_bytes = _cuts_into_bytes(definition)
    for name, number in names.items():
        piece = name.removeprefix(prefix).removesuffix(suffix)
        if _BYTE_TOKEN.fullmatch(name) or (len(piece) == 1 and (all_bytes or piece in characters)):
            kept.add(number)
    for left, right in needed_merges(definition, (by_number[number] for number in kept)):
        kept.update(names[part] for part in (left, right, left + right) if part in names)
    return kept


def needed_merges(definition: Mapping[str, Any], tokens: Iterable[str]) -> set[Pair]:
    """Return the merges of pairs by which byte-pair encoding makes these tokens; other kinds have none."""
    ranks = {pair: rank for rank, pair in enumerate(merges_of(definition))}
    needed: set[Pair] = set()
    suffix = definition["model"].get("end_of_word_suffix") or ""
    for token in tokens if ranks else ():
        pieces = list(token.removesuffix(suffix))
        if pieces and token.endswith(suffix):
            pieces[-1] += suffix
        while found := [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]:
            place = min(found)[1]
            needed.add((pieces[place], pieces[place + 1]))
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return needed


def merges_of(definition: Mapping[str, Any]) -> list[Pair]:
    """Return byte-pair encoding's merges in their order; a file has them as pairs, or as words with a space between."""
    merges: Sequence[Any] = definition["model"].get("merges", ())
    return [_pair(merge) for merge in merges]


def _pair(merge: str | Sequence[str]) -> Pair:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _cuts_into_bytes(part: Any) -> bool:
    """Tell whether every character stands for a byte, as GPT-2's do."""
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(_cuts_into_bytes(value) for value in part.values())
    return isinstance(part, list) and any(_cuts_into_bytes(value) for value in part[:100])
