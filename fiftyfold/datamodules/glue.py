"""GLUEDataModule: any GLUE task, from local files or from the hub, as padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiftyfold.datamodules.glue_files import Rows, find_files, read_file, rows_from_records
from fiftyfold.datamodules.glue_tasks import GLUETask, get_task
from fiftyfold.datamodules.stateful_loader import (
    StatefulLoader,
    place_of,
    plan_evaluation_batches,
    plan_training_batches,
    same_every_epoch,
)
from fiftyfold.datamodules.token_cache import (
    PaddingCollator,
    cached_tokens,
    file_digest,
    token_lengths,
    tokenizer_digest,
)
from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.user_cache import user_cache_folder

HUB_DATASET = "nyu-mll/glue"
"""The hub's copy of GLUE, one configuration per task."""

_UNLABELLED = "unlabelled"


class GLUEDataModule(LightningDataModule):
    """One GLUE task, tokenised.

    Batches are dictionaries of ``input_ids``, ``attention_mask`` and, where the tokenizer gives them,
    ``token_type_ids``, each ``[batch, longest in the batch]``, with ``labels`` ``[batch]`` (class ids, or scores from
    0 to 5 for STS-B) where the split has labels. Training batches come in an order fixed by seed and epoch, and a
    training resumes in mid-epoch at the next batch. Validation batches hold examples of similar length; prediction
    keeps the order of the file.

    ``validate`` reads the development set. GLUE keeps its test labels to itself: ``test`` reads the test set if your
    copy has labels, else the development set; ``predict`` reads the test set if there is one, else the development
    set. A warning says so where it is the development set.

    Args:
        task: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli``, ``qnli``, ``rte``, ``wnli``, or ``ax`` (the
            diagnostic set: only ``test`` and ``predict``).
        tokenizer: a folder or a hub id, or a tokenizer.
        data: a folder in GLUE's form, or one with the task's own files (``train`` and ``dev``, ``.tsv``, ``.csv``,
            ``.jsonl`` or ``.parquet``); None fetches the task from the hub.
        batch_size: training examples per batch and process.
        eval_batch_size: examples per batch elsewhere.
        max_length: longest input in tokens; None gives 64 for single sentences and 128 for pairs. It is never more
            than the tokenizer says that its model can read.
        num_workers: processes that prepare batches in advance. Batches take about a millisecond, so 0 is mostly best.
        limit_train: train on so many examples of the training set only, chosen by the seed.
        augmented: a file written by the augmentation; trained on in place of the training set, which it contains.
        unlabelled: a file with more of the task's texts, in any form that its own files may have; trained on beside
            the training set. Labels in it are not read, and training batches have none: for distillation.
        group_by_length: whether a training batch holds examples of similar length, which saves padding.
        seed: fixes the order of the training examples.
        cache_dir: where tokens are kept; None gives ``~/.cache/fiftyfold``.
    """

    def __init__(
        self,
        task: str,
        tokenizer: str | PreTrainedTokenizerBase,
        data: str | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        max_length: int | None = None,
        num_workers: int = 0,
        limit_train: int | None = None,
        augmented: str | None = None,
        unlabelled: str | None = None,
        group_by_length: bool = False,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.task = get_task(task)
        self.data = data
        self.batch_size = at_least_one("batch_size", batch_size)
        self.eval_batch_size = at_least_one("eval_batch_size", eval_batch_size)
        self.max_length = self.task.max_length if max_length is None else at_least_one("max_length", max_length)
        self.num_workers = num_workers
        self.limit_train = at_least_one("limit_train", limit_train) if limit_train is not None else None
        self.augmented = augmented
        self.unlabelled = unlabelled
        self.group_by_length = group_by_length
        self.seed = seed
        self.cache_folder = Path(cache_dir) if cache_dir else user_cache_folder()
        self._tokenizer = tokenizer
        self._splits: dict[str, datasets.Dataset] = {}
        self._sources: dict[str, tuple[str, Callable[[], Rows]]] | None = None

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for STS-B."""
        return self.task.num_labels

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token (GPT-2's and LLaMA's get their end-of-text token for it).

        Raises:
            FiftyfoldError: if the folder or hub id gives no tokenizer.
        """
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Read, check and tokenise what the coming stage needs, into the cache. Runs in one process per machine."""
        stage = self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit"
        self.setup(stage)

    def setup(self, stage: str) -> None:
        """Load what a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            FiftyfoldError: if a file is missing or wrong; the message names it.
        """
        # The small development set first: what is wrong with it shows before the large training set is tokenised.
        if stage in ("fit", "validate") or not self._can_do_without_validation(stage):
            self._load_validation()
        if stage == "fit":
            self._load_all(self.task.train_splits, "train")

    def source_digests(self) -> dict[str, str]:
        """Return digests of each split's source and of the tokenizer: a run knows by them that its data are the same.

        Raises:
            FiftyfoldError: if there is none.
        """
        sources = {split: digest for split, (digest, _) in self._find_sources().items()}
        return sources | {"tokenizer": tokenizer_digest(self.tokenizer)}

    def training_texts(self) -> Iterator[str]:
        """Yield every text of the training set, of which ``limit_train`` chooses, and of the unlabelled one.

        Raises:
            FiftyfoldError: if a file is missing or wrong.
        """
        sources = self._find_sources()
        if sources.keys().isdisjoint(self.task.train_splits):
            raise self._lack("train")
        for split in (*self.task.train_splits, _UNLABELLED):
            if split in sources:
                yield from chain.from_iterable(sources[split][1]().texts)

    def _can_do_without_validation(self, stage: str) -> bool:
        if not self._load_some(self.task.test_splits):
            return False
        return stage == "predict" or bool(self._labelled_test_splits()) or not self.task.validation_splits

    def train_dataloader(self) -> StatefulLoader:
        """Return the loader of the training set."""
        tokens = self._splits["train"]
        shuffle = not (self.trainer and self.trainer.overfit_batches > 0)
        plan = partial(
            _plan_epoch,
            examples=len(tokens),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            lengths=token_lengths(tokens) if self.group_by_length else None,
            **place_of(self.trainer),
        )
        signature: dict[str, int | bool] = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "examples": len(tokens),
            "processes": place_of(self.trainer)["world_size"],
            "group_by_length": self.group_by_length,
        }
        return self._loader(tokens, plan, signature)

    def val_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Return the loader of the development set; one for each in MNLI."""
        return self._evaluation_loaders(self._loaded(self.task.validation_splits), sort=True)

    def test_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Return the loader of the labelled test set, or of the development set."""
        if splits := self._labelled_test_splits():
            return self._evaluation_loaders(splits, sort=True)
        splits = self._loaded(self.task.validation_splits)
        if not splits:
            raise FiftyfoldError(f"This copy of {self.task.name} has no labels to test with; use predict instead.")
        rank_zero_warn(
            f"This copy of {self.task.name} has no test set with labels: the test scores the development set."
        )
        return self._evaluation_loaders(splits, sort=True)

    def predict_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Return the loader of the test set, or of the development set, in the order of its file."""
        if not self._loaded(self.task.test_splits):
            rank_zero_warn(f"This copy of {self.task.name} has no test set: the development set is predicted.")
        return self._evaluation_loaders(self.predicted_splits, sort=False)

    @property
    def predicted_splits(self) -> tuple[str, ...]:
        """The splits of :meth:`predict_dataloader`, in its order."""
        return self._loaded(self.task.test_splits) or self._loaded(self.task.validation_splits)

    def _load_all(self, splits: tuple[str, ...], name: str) -> None:
        if not splits or not self._load_some(splits):
            raise self._lack(name)

    def _lack(self, name: str) -> FiftyfoldError:
        where = self.data or HUB_DATASET
        return FiftyfoldError(f"{where} has no {name} set for {self.task.name}; add its file or choose another task.")

    def _load_validation(self) -> None:
        self._load_all(self.task.validation_splits, "development")
        names = dict(zip(self.task.validation_splits, self.task.validation_names, strict=True))
        present = self._loaded(self.task.validation_splits)
        self.task = replace(
            self.task, validation_splits=present, validation_names=tuple(names[split] for split in present)
        )

    def _load_some(self, splits: tuple[str, ...]) -> bool:
        sources = self._find_sources()
        for split in splits:
            if split in sources and split not in self._splits:
                self._splits[split] = self._load_split(split)
        return bool(self._loaded(splits))

    def _load_split(self, split: str) -> datasets.Dataset:
        digest, read = self._find_sources()[split]
        tokens = cached_tokens(
            read,
            self.tokenizer,
            source_digest=digest,
            task=self.task.name,
            split=split,
            max_length=min(self.max_length, self.tokenizer.model_max_length),
            cache_folder=self.cache_folder,
        )
        if split == "train" and self.limit_train is not None and self.limit_train < len(tokens):
            chosen = np.random.default_rng(self.seed).permutation(len(tokens))[: self.limit_train]
            tokens = tokens.select(np.sort(chosen))
        if split == "train" and self.unlabelled is not None:
            # as batches of one kind only, so that no loss on labels is taken over a part of a batch unawares
            tokens = datasets.concatenate_datasets([tokens.remove_columns("labels"), self._load_split(_UNLABELLED)])
        return tokens

    def _loaded(self, splits: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(split for split in splits if split in self._splits)

    def _labelled_test_splits(self) -> tuple[str, ...]:
        return tuple(s for s in self._loaded(self.task.test_splits) if "labels" in self._splits[s].column_names)

    def _find_sources(self) -> dict[str, tuple[str, Callable[[], Rows]]]:
        if self._sources is None:
            found = _local_sources(self.data, self.task) if self.data is not None else _hub_sources(self.task)
            if self.augmented is not None:
                path = Path(self.augmented)
                found["train"] = _file_source(path, self.task, labelled=True)
            if self.unlabelled is not None:
                found[_UNLABELLED] = _file_source(Path(self.unlabelled), self.task, labelled=None)
            self._sources = found
        return self._sources

    def _evaluation_loaders(self, splits: tuple[str, ...], *, sort: bool) -> StatefulLoader | list[StatefulLoader]:
        for split in splits:
            self._check_enough(split)
        loaders = [self._evaluation_loader(self._splits[split], sort=sort) for split in splits]
        return loaders[0] if len(loaders) == 1 else loaders

    def _check_enough(self, split: str) -> None:
        """Refuse, on all processes alike, what would leave one without a batch and the others waiting for it."""
        rows, processes = len(self._splits[split]), place_of(self.trainer)["world_size"]
        if rows < processes:
            raise FiftyfoldError(
                f"The {split} set of {self.task.name} has {rows} rows for {processes} processes; use fewer devices."
            )

    def _evaluation_loader(self, tokens: datasets.Dataset, *, sort: bool) -> StatefulLoader:
        batches = plan_evaluation_batches(
            len(tokens), self.eval_batch_size, lengths=token_lengths(tokens) if sort else None, **place_of(self.trainer)
        )
        return self._loader(tokens, same_every_epoch(batches), {})

    def _loader(
        self, tokens: datasets.Dataset, plan: Callable[[int], list[list[int]]], signature: dict[str, int | bool]
    ) -> StatefulLoader:
        pad_token_id = self.tokenizer.pad_token_id
        collate = PaddingCollator(
            pad_token_id, regression=self.task.is_regression, pad_left=self.tokenizer.padding_side == "left"
        )
        return StatefulLoader(
            tokens,
            plan,
            collate,
            signature=signature,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _plan_epoch(epoch: int, **arguments: Any) -> list[list[int]]:
    return plan_training_batches(epoch=epoch, **arguments)


def at_least_one(name: str, value: int) -> int:
    """Return ``value``.

    Raises:
        FiftyfoldError: if it is below 1.
    """
    if value < 1:
        raise FiftyfoldError(f"{name} is {value}, but must be at least 1.")
    return value


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id, with a padding token.

    Raises:
        FiftyfoldError: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise FiftyfoldError(
            f"No tokenizer could be loaded from {name!r} ({first_line(error)}); give a folder that holds"
            " tokenizer.json, or a hub id."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FiftyfoldError(f"The tokenizer {name!r} has neither a padding nor an end token; set its pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _local_sources(folder: str, task: GLUETask) -> dict[str, tuple[str, Callable[[], Rows]]]:
    return {
        split: _file_source(path, task, labelled=split not in task.test_splits)
        for split, path in find_files(folder, task).items()
    }


def _file_source(path: Path, task: GLUETask, *, labelled: bool | None) -> tuple[str, Callable[[], Rows]]:
    if not path.is_file():
        raise FiftyfoldError(f"The file {path} does not exist; check its name.")
    return file_digest(path) + path.suffix, partial(read_file, path, task, labelled=labelled)


def _hub_sources(task: GLUETask) -> dict[str, tuple[str, Callable[[], Rows]]]:
    try:
        splits = datasets.load_dataset(HUB_DATASET, task.name)
    except (OSError, ValueError, RuntimeError) as error:
        raise FiftyfoldError(
            f"{task.name} could not be fetched from {HUB_DATASET} ({first_line(error)}); go online,"
            " or give data a folder with the task's files."
        ) from error
    return {split: (rows._fingerprint, partial(_read_hub, rows, task, split)) for split, rows in splits.items()}


def _read_hub(rows: datasets.Dataset, task: GLUETask, split: str) -> Rows:
    return rows_from_records(
        enumerate(rows, start=1),
        rows.column_names,
        task,
        source=f"{HUB_DATASET} {task.name} {split}",
        labelled=split not in task.test_splits,
    )
