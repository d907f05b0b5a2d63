"""``fiftyfold evaluate``: how well a language model predicts text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress
from transformers import PreTrainedModel

from fiftyfold.app.training import quiet_lightning
from fiftyfold.datamodules import LanguageModelingDataModule
from fiftyfold.datamodules.glue import at_least_one
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.perplexity import TextScore, score_documents, score_masked, score_row
from fiftyfold.modules.pretrained import Objective, load_language_model
from fiftyfold.modules.text_module import check_length, check_vocabulary

Way = Literal["row", "documents"]


def evaluate(
    model: str,
    *,
    data: str,
    split: Literal["train", "validation", "test"] | None = None,
    objective: Objective = "causal",
    way: Way = "row",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    tokenizer: str | None = None,
    document_separator: str = "<|endoftext|>",
    text_column: str = "text",
    output: str | None = None,
) -> None:
    """Score a language model on text: perplexity, nats a token, next-token accuracy.

    Args:
        model: a folder, exported ones included, or a hub id.
        data: a text file, a folder with train, valid and test files, or a hub id.
        split: what to score; by default test, else validation, else train, whichever there is.
        objective: causal, or masked for models that fill in hidden tokens.
        way: row joins all documents and reads them in overlapping windows; documents scores each on its own, after
            the tokenizer's beginning token.
        window: tokens that the model sees at once; by default all that it reads, at most 2048.
        stride: new tokens a window, for the row; by default half a window. The smaller, the slower and the more
            context each token has.
        batch_size: windows at once.
        limit: score only so many tokens (for documents: so many documents) from the beginning.
        tokenizer: folder or hub id of the tokenizer; by default the model's.
        document_separator: what stands between two documents of a .txt file.
        text_column: where JSON objects, parquet files and the hub's sets have their text.
        output: a JSON file to write the figures to.
    """
    if output is not None and Path(output).exists():
        raise FiftyfoldError(f"{output} is there already; name another file.")
    if limit is not None:
        at_least_one("limit", limit)
    quiet_lightning()
    loaded = load_language_model(model, "model", objective)
    text = LanguageModelingDataModule(
        tokenizer or model,
        data,
        objective=objective,
        sequence_length=longest_window(loaded) if window is None else window,
        document_separator=document_separator,
        text_column=text_column,
        eval_batch_size=batch_size,
    )
    chosen = split or text.last_split()
    score = score_text(
        loaded, text, chosen, way=way, stride=stride, batch_size=batch_size, limit=limit, show_progress=True
    )
    figures = {
        "model": model,
        "data": data,
        "split": chosen,
        "way": way if objective == "causal" else "masked",
        "window": text.sequence_length,
        "stride": _stride(text, way, stride),
        **score.to_json(),
    }
    print(json.dumps(figures, indent=2))
    if output is not None:
        Path(output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def score_text(
    model: PreTrainedModel,
    text: LanguageModelingDataModule,
    split: str,
    *,
    way: Way = "row",
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    show_progress: bool = False,
) -> TextScore:
    """Score a model on one split of a datamodule, whose ``sequence_length`` is the window.

    Raises:
        FiftyfoldError: if model and text do not fit.
    """
    window = text.sequence_length
    check_length(model, window, "model")
    check_vocabulary(model, text.tokenizer, "model")
    with Progress(transient=True, disable=not show_progress) as bar:
        task = bar.add_task(f"Scoring {split}")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        arguments: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        if text.objective == "masked":
            return score_masked(model, list(text.whole_loader(split, limit)), progress=progress)
        if way == "documents":
            first = text.tokenizer.bos_token_id
            return score_documents(model, text.documents(split)[:limit], first_token=first, window=window, **arguments)
        return score_row(model, text.row(split)[:limit], window=window, stride=stride, **arguments)


def _stride(text: LanguageModelingDataModule, way: Way, stride: int | None) -> int | None:
    """Return the new tokens a window where windows overlap, and nothing where each sequence is read by itself."""
    if text.objective == "masked":
        return None
    half = max(1, text.sequence_length // 2)
    return half if stride is None or way == "documents" else stride


def longest_window(model: PreTrainedModel, most: int = 2048) -> int:
    """Return how many tokens a model reads, at most ``most``."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return min(longest, most) if isinstance(longest, int) and longest > 0 else most
