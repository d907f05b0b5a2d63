"""A tokenizer with fewer tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, tee
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.modules.vocabulary.tokens import encode_texts, merges_of, needed_merges

DEFINITION_FILE = "tokenizer.json"
_KEPT_FILES = {DEFINITION_FILE, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
_SET_LATER = ("name_or_path", "padding_side", "truncation_side")  # which transformers does not save
_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")


def read_definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a fast tokenizer's ``tokenizer.json`` says.

    Raises:
        FiftyfoldError: if it is not a fast one, or of a kind that cannot be cut.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FiftyfoldError(
            f"{type(tokenizer).__name__} has no {DEFINITION_FILE}, so that its vocabulary cannot be trimmed; use the "
            "model's fast tokenizer."
        )
    definition: dict[str, Any] = json.loads(backend.to_str())
    if (kind := definition["model"].get("type")) not in _KINDS:
        raise FiftyfoldError(f"a vocabulary of the kind {kind!r} cannot be trimmed, only {', '.join(_KINDS)}.")
    return definition


def named_tokens(definition: Mapping[str, Any]) -> set[int]:
    """Return the tokens that a definition names by their numbers, or cannot do without: the unknown one is such.

    So is Unigram's least likely token: unknown characters are a step less likely than that.
    """
    model, padding = definition["model"], definition.get("padding")
    found = {*_numbers_in(definition.get("post_processor")), padding and padding["pad_id"]}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        found |= {model.get("unk_id"), scores.index(min(scores))}
    else:
        found.add(model["vocab"].get(model.get("unk_token")))
    return {number for number in found if number is not None}


def trimmed_tokenizer(
    tokenizer: PreTrainedTokenizerBase, definition: Mapping[str, Any], numbers: Mapping[int, int]
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has some of the tokens, under new numbers.

    Args:
        tokenizer: the whole one, which stays as it is.
        definition: as :func:`read_definition` returns it.
        numbers: from the numbers of the kept tokens to their new ones, from 0 on.

    Raises:
        FiftyfoldError: if what transformers reads back is another vocabulary.
    """
    expected = {name: numbers[number] for name, number in tokenizer.get_vocab().items() if number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.is_file() and file.name not in _KEPT_FILES:
                file.unlink()  # the whole vocabulary in an older form, which would be read in place of ours
        content = json.dumps(_trimmed(definition, numbers), ensure_ascii=False)
        (Path(folder) / DEFINITION_FILE).write_text(content, encoding="utf-8")
        try:
            trimmed: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizers raises no kind of its own
            raise FiftyfoldError(
                f"{type(tokenizer).__name__} cannot be trimmed ({first_line(error)[:200]}); keep its whole vocabulary."
            ) from error
    for name in _SET_LATER:
        setattr(trimmed, name, getattr(tokenizer, name))
    if trimmed.get_vocab() != expected:
        raise FiftyfoldError(
            f"{type(tokenizer).__name__} numbers its tokens in a way of its own; keep its whole vocabulary."
        )
    return trimmed


def check_trimmed(
    tokenizer: PreTrainedTokenizerBase,
    trimmed: PreTrainedTokenizerBase,
    numbers: Mapping[int, int],
    texts: Iterable[str],
) -> int:
    """Compare what two tokenizers make of every text.

    Returns:
        The number of texts.

    Raises:
        FiftyfoldError: if that differs.
    """
    count, (one, two) = 0, tee(texts)
    pairs = zip(encode_texts(tokenizer, one), encode_texts(trimmed, two), strict=True)
    for whole, other in pairs:
        count += 1
        if [numbers.get(number) for number in whole] != other:
            shown = tokenizer.decode(whole, skip_special_tokens=True)[:60]
            raise FiftyfoldError(
                f"{type(tokenizer).__name__} would cut {shown!r} otherwise with fewer tokens; keep all of them."
            )
    return count


def _trimmed(definition: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    model = dict(definition["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in numbers]
        model["unk_id"] = None if model.get("unk_id") is None else numbers[model["unk_id"]]
    else:
        model["vocab"] = {name: numbers[number] for name, number in model["vocab"].items() if number in numbers}
    if model["type"] == "BPE":
        needed = needed_merges(definition, model["vocab"])
        model["merges"] = [list(pair) for pair in merges_of(definition) if pair in needed]
    added = [token | {"id": numbers[token["id"]]} for token in definition["added_tokens"]]
    padding = definition.get("padding")
    return {
        **definition,
        "model": model,
        "added_tokens": added,
        "padding": padding and padding | {"pad_id": numbers[padding["pad_id"]]},
        "post_processor": _renumbered(definition.get("post_processor"), numbers),
    }


def _numbers_in(part: Any) -> Iterator[int]:
    """Yield the numbers of a post-processor: those of a template's ``ids``, or of pairs of a token and its number."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from value if key == "ids" else _numbers_in(value)
    elif isinstance(part, list):
        yield from part[1:] if _is_token(part) else chain.from_iterable(map(_numbers_in, part))


def _is_token(pair: list[Any]) -> bool:
    return len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int)


def _renumbered(part: Any, numbers: Mapping[int, int]) -> Any:
    """Return a post-processor with new numbers in the places of :func:`_numbers_in`."""
    if isinstance(part, dict):
        return {
            key: [numbers[number] for number in value] if key == "ids" else _renumbered(value, numbers)
            for key, value in part.items()
        }
    if isinstance(part, list):
        if _is_token(part):
            return [part[0], numbers[part[1]]]
        return [_renumbered(value, numbers) for value in part]
    return part
