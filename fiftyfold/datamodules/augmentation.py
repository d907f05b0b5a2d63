"""TinyBERT's data augmentation: more training sentences by replacing words (Jiao et al. 2020, algorithm 1).

The teacher labels whatever it is shown, so a distilled student can train on sentences whose own label is doubtful.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiftyfold.datamodules.glue_files import Rows, read_file
from fiftyfold.datamodules.glue_tasks import GLUETask, get_task
from fiftyfold.datamodules.token_cache import file_digest
from fiftyfold.datamodules.word_candidates import (
    EmbeddingNeighbours,
    MaskedLanguageModel,
    Span,
    match_case,
    merge_candidates,
    read_synonyms,
    replaceable_words,
)
from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_lock import sole_writer
from fiftyfold.file_replacement import replaced_file, sync

VARIANTS = {"cola": 30, "mrpc": 30, "stsb": 30, "rte": 30, "wnli": 30, "sst2": 20, "qnli": 20, "mnli": 10, "qqp": 10}
"""New sentences per sentence that TinyBERT's authors make for each task (none for WNLI: as for RTE)."""

_FORMAT_VERSION = 1
_ROW_NUMBER = re.compile(rb'\{"row": (\d+), ')

Progress = Callable[[int, int], None]
"""Called with the number of training rows done, and of all."""


@dataclass(frozen=True)
class AugmentationReport:
    """What an augmentation came to.

    Attributes:
        path: the file with the augmented rows.
        source_rows: rows of the training set.
        rows: rows written, the training set's own included.
        cached: whether the file was there already, made from the same source with the same settings.
        resumed_at: the training row at which an interrupted run was taken up; 0 if there was none.
    """

    path: Path
    source_rows: int
    rows: int
    cached: bool
    resumed_at: int


class Augmenter:
    """Makes variants of sentences.

    Args:
        synonyms: words and their synonyms.
        neighbours: neighbours in an embedding; they follow the synonyms.
        masked_lm: guesses for words of one piece, in place of the other two.
        count: candidates per word (TinyBERT's M).
        probability: share of the words that a variant replaces.
    """

    def __init__(
        self,
        *,
        synonyms: dict[str, list[str]] | None = None,
        neighbours: EmbeddingNeighbours | None = None,
        masked_lm: MaskedLanguageModel | None = None,
        count: int = 15,
        probability: float = 0.4,
    ) -> None:
        if synonyms is None and neighbours is None and masked_lm is None:
            raise FiftyfoldError(
                "Augmentation needs words to replace others with; give a list of synonyms, a model with a word"
                " embedding, or a masked language model."
            )
        if not 0 < probability <= 1:
            raise FiftyfoldError(
                f"The probability of replacing a word is {probability}, but must lie above 0 and up to 1."
            )
        if count < 1:
            raise FiftyfoldError(f"The number of candidates per word is {count}, but must be at least 1.")
        self._synonyms = synonyms or {}
        self._neighbours = neighbours
        self._masked_lm = masked_lm
        self._count = count
        self._probability = probability
        self._candidates: dict[str, list[str]] = {}

    def learn_words(self, texts: Sequence[str]) -> None:
        """Look up the candidates of all words of some texts at once, which is much quicker than one by one."""
        words = {text[s:e].lower() for text in texts for s, e in replaceable_words(text)} - self._candidates.keys()
        ordered = sorted(words)
        near = self._neighbours.find(ordered, self._count) if self._neighbours else {}
        for word in ordered:
            sources = (self._synonyms.get(word, ()), near.get(word, ()))
            self._candidates[word] = merge_candidates(sources, word, self._count)

    def variants(self, text: str, number: int, generator: random.Random) -> list[str]:
        """Return up to ``number`` different variants of a text, none of them the text itself.

        As in TinyBERT, every try picks a candidate for each word and puts it in with the given probability; a try that
        gives nothing new is not repeated.
        """
        choices = self._choices(text)
        found: dict[str, None] = {}
        for _ in range(number if choices else 0):
            found[self._replace(text, choices, generator)] = None
        found.pop(text, None)
        return list(found)

    def _choices(self, text: str) -> list[tuple[Span, list[str]]]:
        spans = replaceable_words(text)
        guesses = self._masked_lm.find(text, spans, self._count) if self._masked_lm and spans else {}
        choices = []
        for start, end in spans:
            word = text[start:end]
            candidates = guesses.get((start, end)) or self._lookup(word.lower())
            if candidates:
                choices.append(((start, end), [match_case(candidate, word) for candidate in candidates]))
        return choices

    def _lookup(self, word: str) -> list[str]:
        if word not in self._candidates:
            self.learn_words([word])
        return self._candidates[word]

    def _replace(self, text: str, choices: list[tuple[Span, list[str]]], generator: random.Random) -> str:
        parts, done = [], 0
        for (start, end), candidates in choices:
            if generator.random() < self._probability:
                parts += [text[done:start], candidates[int(generator.random() * len(candidates))]]
                done = end
        parts.append(text[done:])
        return "".join(parts)


def augment_row(texts: Sequence[str], augmenter: Augmenter, number: int, *, seed: int, row: int) -> list[list[str]]:
    """Return a row and its variants.

    Of a pair, each text is replaced in turn while the other stays as it is. (TinyBERT's own script leaves the first
    text at its last variant while it replaces the second; the paper does not ask for that.)

    Args:
        texts: the one or two texts of the row.
        augmenter: makes the variants.
        number: variants per text.
        seed: fixes the random choices, together with ``row``: so they do not hang on which rows came before.
        row: the row's number.
    """
    generator = random.Random(f"{seed}/{row}")  # noqa: S311
    rows = [list(texts)]
    for place, text in enumerate(texts):
        for variant in augmenter.variants(text, number, generator):
            rows.append([*texts[:place], variant, *texts[place + 1 :]])
    return rows


def augment_file(
    source: str | Path,
    output: str | Path,
    task: str,
    *,
    embeddings: str | None = None,
    synonyms: str | Path | None = None,
    masked_lm: str | None = None,
    variants: int | None = None,
    candidates: int = 15,
    probability: float = 0.4,
    seed: int = 42,
    progress: Progress | None = None,
) -> AugmentationReport:
    """Write a training set and its variants as JSON lines, which ``GLUEDataModule(augmented=…)`` reads.

    The file is written as ``<output>.part`` and gets its name when it is complete. A run that was interrupted is taken
    up where it stopped, with the same outcome. ``<output>.manifest.json`` records source, settings and digests; if the
    file is there, made of the same source with the same settings, nothing is done.

    Args:
        source: the training file, in any form that GLUEDataModule reads.
        output: the file to write.
        task: the task's name.
        embeddings: folder or hub id of a model whose word embedding gives neighbours.
        synonyms: file with a word and its synonym on each line.
        masked_lm: folder or hub id of a masked language model for the words of one piece.
        variants: tries per text; None takes TinyBERT's number for the task.
        candidates: candidates per word.
        probability: share of the words that a variant replaces.
        seed: fixes all random choices.
        progress: told of the rows done.

    Raises:
        FiftyfoldError: if a file or model is missing or wrong, if ``output`` is something else, or if another run is
            writing it.
    """
    definition = get_task(task)
    number = VARIANTS.get(definition.name, 0) if variants is None else variants
    if number < 1:
        raise FiftyfoldError(f"{definition.name} gets {number} variants per text; give variants, at least 1.")
    output = Path(output)
    rows = read_file(source, definition)
    neighbours = EmbeddingNeighbours(embeddings) if embeddings else None
    model = MaskedLanguageModel(masked_lm) if masked_lm else None
    augmenter = Augmenter(
        synonyms=read_synonyms(synonyms) if synonyms else None,
        neighbours=neighbours,
        masked_lm=model,
        count=candidates,
        probability=probability,
    )
    settings = {
        "format": _FORMAT_VERSION,
        "task": definition.name,
        "source": file_digest(Path(source)),
        "embeddings": neighbours.digest if neighbours else None,
        "synonyms": file_digest(Path(synonyms)) if synonyms else None,
        "masked_lm": model.digest if model else None,
        "variants": number,
        "candidates": candidates,
        "probability": probability,
        "seed": seed,
    }
    manifest = output.with_name(output.name + ".manifest.json")
    if output.exists():
        return _take_finished(output, manifest, settings, len(rows))
    part = output.with_name(output.name + ".part")
    with _claimed(part, output):
        if output.exists():  # another run has ended between the look above and the lock
            part.unlink()
            return _take_finished(output, manifest, settings, len(rows))
        start, written = _take_part(part, manifest, settings)
        augmenter.learn_words([text for texts in rows.texts for text in texts])
        lines = _lines(rows, definition, augmenter, number=number, seed=seed, start=start)
        written += _append(part, lines, start, len(rows), progress)
        _write_json(manifest, {"settings": settings, "rows": written, "digest": file_digest(part)})
        sync(part)
        part.rename(output)
    return AugmentationReport(output, len(rows), written, cached=False, resumed_at=start)


@contextmanager
def _claimed(part: Path, output: Path) -> Iterator[None]:
    """Make the folder, hold the unfinished file so that no other run appends to it, and say so if the disk refuses."""
    with ExitStack() as stack:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(part, str(output)))
        except OSError as error:
            raise FiftyfoldError(
                f"{part.parent} cannot be written ({error.strerror or error}); give another output."
            ) from error
        try:
            yield
        except OSError as error:
            raise FiftyfoldError(
                f"{part} cannot be written ({error.strerror or error}); free some space or give another output, and"
                " start again: the work done so far is kept."
            ) from error


def _lines(
    rows: Rows, task: GLUETask, augmenter: Augmenter, *, number: int, seed: int, start: int
) -> Iterator[list[str]]:
    """Yield the lines of each row from ``start`` on."""
    columns = [names[0] for names in task.text_columns]
    labels = rows.labels or []
    for row in range(start, len(rows)):
        made = augment_row([texts[row] for texts in rows.texts], augmenter, number, seed=seed, row=row)
        tail = {task.label_columns[0]: labels[row]}
        yield [
            json.dumps({"row": row, **dict(zip(columns, texts, strict=True)), **tail}, ensure_ascii=False) + "\n"
            for texts in made
        ]


def _append(part: Path, groups: Iterator[list[str]], start: int, total: int, progress: Progress | None) -> int:
    written = 0
    with part.open("a", encoding="utf-8", newline="\n") as file:
        for row, lines in enumerate(groups, start=start):
            file.writelines(lines)
            written += len(lines)
            if progress is not None:
                progress(row + 1, total)
    return written


def _take_finished(output: Path, manifest: Path, settings: dict[str, Any], source_rows: int) -> AugmentationReport:
    saved = _read_json(manifest)
    if saved.get("settings") != settings:
        raise FiftyfoldError(f"{output} exists and holds something else; remove it or give another output.")
    if saved.get("digest") != file_digest(output) or type(saved.get("rows")) is not int:
        raise FiftyfoldError(f"{output} was changed after it was written; remove it or give another output.")
    return AugmentationReport(output, source_rows, saved["rows"], cached=True, resumed_at=0)


def _take_part(part: Path, manifest: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Prepare the unfinished file; return the row to begin with, and the number of lines that stay."""
    if part.stat().st_size == 0:
        _write_json(manifest, {"settings": settings})
        return 0, 0
    if _read_json(manifest).get("settings") != settings:
        raise FiftyfoldError(
            f"{part} was begun from another source or with other settings; remove it or give another output."
        )
    return _cut_last_row(part)


def _cut_last_row(part: Path) -> tuple[int, int]:
    """Drop the last row with all its variants, since some may be missing."""
    row = lines = place = 0
    begins, kept = 0, 0
    with part.open("rb") as file:
        for line in file:
            match = _ROW_NUMBER.match(line)
            if match is None:
                break
            if int(match[1]) != row:
                row, begins, kept = int(match[1]), place, lines
            place += len(line)
            lines += 1
    with part.open("r+b") as file:
        file.truncate(begins)
    return row, kept


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replaced_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
