"""``fiftyfold trim``: a model without the tokens that texts of its kind never have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import transformers
from rich.console import Console
from transformers import AutoConfig, PreTrainedModel

from fiftyfold.app.road import weights_bytes
from fiftyfold.app.training import claim_output
from fiftyfold.datamodules import GLUEDataModule
from fiftyfold.datamodules.glue import load_tokenizer
from fiftyfold.datamodules.text_files import find_sources
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.folder_replacement import replaced_folder
from fiftyfold.modules.pretrained import has_packed_layers, open_pretrained
from fiftyfold.modules.vocabulary import trim_vocabulary


def trim(
    model: str,
    output: str,
    *,
    data: str | None = None,
    task: str | None = None,
    unlabelled: str | None = None,
    document_separator: str = "<|endoftext|>",
    text_column: str = "text",
) -> None:
    """Write a model and its tokenizer without the tokens that training texts do not use.

    The texts are cut into the same tokens as before, and the model computes the same of them; other words are read in
    smaller pieces. What it writes is a plain folder of transformers: train it on, or compress it.

    Args:
        model: a folder or a hub id; nothing in it may be compressed yet.
        output: folder to write; must not hold anything.
        data: with a task, the folder with its files, or the hub's GLUE if left out; without one, text: a file, a folder
            with a train file, or a hub id; validation and test files in it are not looked at.
        task: GLUE task whose form the data have; leave it out for plain text.
        unlabelled: with a task, a file with more texts of its form.
        document_separator: for plain text, what stands between two documents of a .txt file.
        text_column: for plain text, where JSON objects, parquet files and the hub's sets have it.
    """
    target = Path(output).expanduser()
    claim_output(target)
    tokenizer = load_tokenizer(model)
    texts: Callable[[], Iterable[str]]
    if task is not None:
        texts = GLUEDataModule(task, tokenizer, data, unlabelled=unlabelled).training_texts
    elif unlabelled is not None or data is None:
        raise FiftyfoldError("name the text (--data), or the task (--task) whose training set is the text.")
    else:
        sources = find_sources(data, separator=document_separator, column=text_column)
        if "train" not in sources:
            raise FiftyfoldError(f"{data} has no training text; name one of its files train, or give that file alone.")
        texts = sources["train"].read
    opened = _open(model)
    with Console().status("finding the tokens that the texts need"):
        trimmed = trim_vocabulary(opened, tokenizer, texts)
    with replaced_folder(target) as aside:
        opened.save_pretrained(aside)
        trimmed.save_pretrained(aside)
    before, after = weights_bytes(model), weights_bytes(str(target))
    print(
        f"{output}: {len(trimmed):,} of {len(tokenizer):,} tokens, {after / 2**20:.2f} of {before / 2**20:.2f} MiB; "
        "the texts are read as before"
    )


def _open(source: str) -> PreTrainedModel:
    """Open a model as what it was saved as, in the precision that it was saved in."""
    place = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    try:
        config = AutoConfig.from_pretrained(place)
    except Exception as error:  # a configuration can make any part of transformers stumble
        raise FiftyfoldError(f"the model {source!r} cannot be read ({first_line(error)}).") from error
    kind: type[PreTrainedModel] | None
    kind, dtype = getattr(transformers, str((config.architectures or [None])[0]), None), config.dtype
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise FiftyfoldError(f"{source} does not name a class of transformers in its config.json (architectures).")
    auto_class = SimpleNamespace(from_config=kind._from_config, from_pretrained=kind.from_pretrained)
    model, missing = open_pretrained(auto_class, source, role="model", kind=kind.__name__)
    if missing:
        raise FiftyfoldError(f"the model {source!r} has no weights for {missing[0]!r}; its file is incomplete.")
    if has_packed_layers(model):
        raise FiftyfoldError(f"{source} is compressed already; trim the model that it was made of, and compress that.")
    return model if dtype is None else model.to(dtype)
