"""``fiftyfold augment``: more training sentences, as TinyBERT makes them."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fiftyfold.datamodules.augmentation import augment_file


def augment(
    source: str,
    output: str,
    *,
    task: str,
    embeddings: str | None = None,
    synonyms: str | None = None,
    masked_lm: str | None = None,
    variants: int | None = None,
    candidates: int = 15,
    probability: float = 0.4,
    seed: int = 42,
) -> None:
    """Write a training set with further sentences made by replacing words.

    Ctrl-C loses nothing: the same command goes on where it stopped. A finished file of the same source and settings is
    left as it is. Train on it with `fiftyfold compress ... --augmented OUTPUT`.

    Args:
        source: the task's training file.
        output: the file to write, as JSON lines.
        task: the GLUE task whose form the file has.
        embeddings: folder or hub id of a model whose word embedding gives neighbours.
        synonyms: file with a word and its synonym on each line.
        masked_lm: folder or hub id of a masked language model, for words of one piece.
        variants: tries for each sentence; by default TinyBERT's number for the task.
        candidates: candidates for each word.
        probability: share of the words that a variant replaces.
        seed: the same seed gives the same file.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        row = bar.add_task("rows", total=None)
        report = augment_file(
            source,
            output,
            task,
            embeddings=embeddings,
            synonyms=synonyms,
            masked_lm=masked_lm,
            variants=variants,
            candidates=candidates,
            probability=probability,
            seed=seed,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )
    how = "was there already" if report.cached else f"taken up at row {report.resumed_at}" * bool(report.resumed_at)
    size = Path(report.path).stat().st_size / 2**20
    print(f"{report.path}: {report.rows} rows from {report.source_rows}, {size:.1f} MiB" + (f" ({how})" if how else ""))
