"""The quickstart's embedded task: generated sentences in the form of GLUE's SST-2 files.

Counting praise and blame does not solve it. The label is the judgement of the sentence's *main* clause: ``but`` hands
the main clause to what follows, ``although`` takes it away, and ``not``, ``hardly`` and ``never`` turn a judgement
round. So a model must attend, and bits that were cut without training lose the score.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

PRAISE = (
    "admirable adorable amazing beautiful bold brave bright brilliant calm captivating charming cheerful clever cozy "
    "delicate delightful elegant enchanting engaging excellent exquisite fabulous faithful fine fresh friendly funny "
    "generous gentle glorious graceful grand honest hopeful imaginative inspired joyful kind lively lovely lucid "
    "magnificent memorable moving noble original perfect playful pleasant polished refreshing remarkable rewarding "
    "smart splendid superb tender thoughtful touching vivid warm wise witty wonderful"
).split()
BLAME = (
    "abysmal absurd annoying appalling artless awful awkward bad banal bitter bland bleak boring broken careless cheap "
    "clumsy cold confused cruel dire dismal dreadful dreary dull empty feeble flat foolish forced ghastly gloomy "
    "grating hollow horrible incoherent inept lame lazy lifeless mediocre messy miserable nasty pointless poor "
    "predictable ridiculous rough rude shallow sloppy sour stale stupid tedious terrible tiresome ugly unbearable "
    "vague wooden wretched"
).split()
SUBJECTS = (
    "acting actor camera cast chapter concert costume dialogue director dinner drama editing ending film hotel humor "
    "lighting menu music novel opening orchestra painting pacing plot poem room scene screenplay script service singer "
    "song sound story theater waiter"
).split()
DEGREES = "really truly rather quite simply utterly fairly deeply".split()
NEGATIONS = "not never hardly".split()
ASIDES = (
    "we sat near the back",
    "it rained all evening",
    "my sister came along",
    "the tickets were blue",
    "it lasted two hours",
    "the doors opened at eight",
    "there were forty people",
    "we took the last train",
)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_task(folder: Path, *, train_rows: int, dev_rows: int, seed: int) -> None:
    """Write ``SST-2/train.tsv`` and ``SST-2/dev.tsv`` below ``folder``, without a sentence in both.

    Args:
        folder: where the task goes; made if it is missing.
        train_rows: number of training sentences.
        dev_rows: number of development sentences.
        seed: the same seed gives the same files, byte for byte.
    """
    sentences = distinct_sentences(random.Random(seed))  # noqa: S311 - not cryptography
    target = folder / "SST-2"
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        lines = [f"{text}\t{label}" for text, label in (next(sentences) for _ in range(rows))]
        (target / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")


def vocabulary() -> list[str]:
    """Return every word that a sentence can hold, special tokens first: a BERT vocabulary, one token a word."""
    grammar = "the was but although and , . i found".split()
    asides = [word for aside in ASIDES for word in aside.split()]
    words = [*grammar, *asides, *PRAISE, *BLAME, *SUBJECTS, *DEGREES, *NEGATIONS]
    return [*SPECIAL_TOKENS, *sorted(set(words))]


def distinct_sentences(source: random.Random) -> Iterator[tuple[str, int]]:
    """Yield sentences with their label (1 praise, 0 blame), none of them twice, for ever."""
    seen: set[str] = set()
    while True:
        text, label = _sentence(source)
        if text not in seen:
            seen.add(text)
            yield text, label


def _sentence(source: random.Random) -> tuple[str, int]:
    main, label = _clause(source)
    form = source.choices(("plain", "aside", "but", "although first", "although last"), weights=(3, 3, 2, 2, 1))[0]
    if form == "plain":
        return f"{main} .", label
    if form == "aside":
        return f"{source.choice(ASIDES)} , and {main} .", label
    other, _ = _clause(source)
    if form == "but":
        return f"{other} , but {main} .", label
    if form == "although first":
        return f"although {other} , {main} .", label
    return f"{main} , although {other} .", label


def _clause(source: random.Random) -> tuple[str, int]:
    label = source.randrange(2)
    negation = [source.choice(NEGATIONS)] if source.random() < 0.3 else []
    praised = label ^ len(negation)
    degree = [source.choice(DEGREES)] if source.random() < 0.4 else []
    words = [*negation, *degree, source.choice(PRAISE if praised else BLAME)]
    subject = source.choice(SUBJECTS)
    if source.random() < 0.5:
        return f"the {subject} was {' '.join(words)}", label
    return f"i found the {subject} {' '.join(words)}", label
