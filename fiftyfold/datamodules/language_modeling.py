"""LanguageModelingDataModule: text for causal and masked language models, as packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from fiftyfold.datamodules.glue import at_least_one, load_tokenizer
from fiftyfold.datamodules.packed_text import (
    MaskingCollator,
    PackedSequences,
    Tokens,
    causal_batch,
    join_documents,
    tokenize_documents,
)
from fiftyfold.datamodules.stateful_loader import (
    Batch,
    StatefulLoader,
    place_of,
    plan_evaluation_batches,
    plan_training_batches,
    same_every_epoch,
)
from fiftyfold.datamodules.text_files import TextSource, find_sources
from fiftyfold.datamodules.token_cache import tokenizer_digest
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.pretrained import Objective
from fiftyfold.user_cache import user_cache_folder

LONGEST_DEFAULT = 512
"""Length of a sequence where none is named, if the tokenizer's model reads as much."""

HELD_OUT_SHARE = 0.05
"""Share of the training text that is validated on where the data have no validation set."""


class LanguageModelingDataModule(LightningDataModule):
    """Text as packed sequences of one length.

    The documents are joined into one row of tokens, with a mark between them, and cut into sequences without padding.
    Batches are dictionaries of ``input_ids`` and ``labels``, both [batch, sequence_length]: for a causal model the same
    tokens, for a masked one -100 where nothing is hidden. Training batches come in an order fixed by seed and epoch (so
    do the masks), and a training resumes in mid-epoch at the next batch.

    ``validate`` reads the validation set, or the last 5 % of the training text where there is none; ``test`` reads the
    test set, or else what ``validate`` reads.

    Args:
        tokenizer: a folder or a hub id, or a tokenizer.
        data: a text file, a folder with train, valid and test files (``.txt``, ``.jsonl``, ``.json`` with one object a
            line, ``.parquet``), or a hub id, with its configuration after a colon.
        objective: ``"causal"`` (predict the next token) or ``"masked"`` (fill in hidden ones).
        sequence_length: tokens a sequence, special ones included; by default what the tokenizer's model reads, at most
            512.
        document_separator: what stands between two documents of a ``.txt`` file; a file without it is one document.
        text_column: where JSON objects, parquet files and the hub's sets have their text.
        batch_size: training sequences per batch and process.
        eval_batch_size: sequences per batch elsewhere.
        mask_share: share of the tokens that are hidden, for ``"masked"``.
        limit_train: train on so many sequences only, chosen by the seed.
        num_workers: processes that prepare batches in advance.
        seed: fixes the order of the training sequences, and the masks.
        cache_dir: where tokens are kept; None gives ``~/.cache/fiftyfold``.

    Raises:
        FiftyfoldError: if an argument makes no sense.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        data: str,
        *,
        objective: Objective = "causal",
        sequence_length: int | None = None,
        document_separator: str = "<|endoftext|>",
        text_column: str = "text",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        mask_share: float = 0.15,
        limit_train: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mask_share < 1:
            raise FiftyfoldError(f"mask_share is a share of the tokens, above 0 and below 1, not {mask_share}.")
        self.data = data
        self.objective: Objective = objective
        self.batch_size = at_least_one("batch_size", batch_size)
        self.eval_batch_size = at_least_one("eval_batch_size", eval_batch_size)
        self.limit_train = None if limit_train is None else at_least_one("limit_train", limit_train)
        self.document_separator = document_separator
        self.text_column = text_column
        self.mask_share = mask_share
        self.num_workers = num_workers
        self.seed = seed
        self.cache_folder = Path(cache_dir) if cache_dir else user_cache_folder()
        self._tokenizer = tokenizer
        self._sequence_length = None if sequence_length is None else at_least_one("sequence_length", sequence_length)
        if self._sequence_length == 1:
            raise FiftyfoldError("a sequence of 1 token predicts nothing; it takes at least 2.")
        self._found_sources: dict[str, TextSource] | None = None
        self._documents: dict[str, list[Tokens]] = {}
        self._sequences: dict[str, PackedSequences] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            FiftyfoldError: if the folder or hub id gives none, or it has no mask token and the objective needs one.
        """
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        if self.objective == "masked" and self._tokenizer.mask_token_id is None:
            raise FiftyfoldError("the tokenizer has no mask token; for a causal model say objective='causal'.")
        return self._tokenizer

    @property
    def sequence_length(self) -> int:
        """Tokens a sequence."""
        if self._sequence_length is not None:
            return self._sequence_length
        return min(LONGEST_DEFAULT, int(self.tokenizer.model_max_length))

    def has_split(self, split: str) -> bool:
        """Tell whether the data have ``train``, ``validation`` or ``test`` text of their own."""
        return split in self._sources()

    def last_split(self) -> str:
        """Return ``test`` if the data have it, else ``validation``, else ``train``."""
        sources = self._sources()
        return next(split for split in ("test", "validation", "train") if split in sources)

    def source_digests(self) -> dict[str, str]:
        """Return digests of each split's source and of the tokenizer: a run knows by them that its data are the same.

        Raises:
            FiftyfoldError: if there is nothing to read.
        """
        sources = {split: source.digest for split, source in self._sources().items()}
        return sources | {"tokenizer": tokenizer_digest(self.tokenizer)}

    def documents(self, split: str) -> list[torch.Tensor]:
        """Return the documents of ``train``, ``validation`` or ``test``, tokens without special ones, [tokens] each.

        Raises:
            FiftyfoldError: if the data have no such split, or it holds no text.
        """
        return [torch.from_numpy(document.astype(np.int64)) for document in self._tokens(split)]

    def row(self, split: str) -> torch.Tensor:
        """Return a split as one row of tokens, [tokens], with a mark between documents.

        Raises:
            FiftyfoldError: if the data have no such split, or it holds no text.
        """
        return torch.from_numpy(join_documents(self._tokens(split), self.tokenizer, self.objective).astype(np.int64))

    def prepare_data(self) -> None:
        """Read and tokenise, into the cache. Runs in one process per machine."""
        self.setup(self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit")

    def setup(self, stage: str) -> None:
        """Load what a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            FiftyfoldError: if there is no text, or less than one sequence.
        """
        sources = self._sources()
        if stage == "fit" and "train" not in sources:
            raise FiftyfoldError(f"{self.data} has no training text; add a file train.txt.")
        if stage in ("test", "predict") and "test" in sources:
            self._load("test")
            return
        if "validation" in sources:
            self._load("validation")
        if stage == "fit" or "validation" not in sources:
            self._load_train()

    def whole_loader(self, split: str, most: int | None = None) -> StatefulLoader:
        """Return a loader of a split in whole, nothing of it held out, in its order.

        Args:
            split: ``train``, ``validation`` or ``test``.
            most: only so many tokens from its beginning, or those of one sequence if they are fewer.

        Raises:
            FiftyfoldError: if the data have no such split, or it holds less than one sequence.
        """
        sequences = self._pack(split)
        if most is not None:
            sequences = sequences.part(slice(0, max(1, most // self.sequence_length)))
        return self._evaluation_loader(sequences, split)

    def train_dataloader(self) -> StatefulLoader:
        """Return the loader of the training text."""
        sequences = self._sequences["train"]
        plan = partial(
            _plan_epoch,
            examples=len(sequences),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not (self.trainer and self.trainer.overfit_batches > 0),
            **place_of(self.trainer),
        )
        signature: dict[str, int | bool] = {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "examples": len(sequences),
            "processes": place_of(self.trainer)["world_size"],
        }
        return self._loader(sequences, plan, signature)

    def val_dataloader(self) -> StatefulLoader:
        """Return the loader of the validation text."""
        return self._evaluation_loader(self._sequences["validation"], "validation")

    def test_dataloader(self) -> StatefulLoader:
        """Return the loader of the test text, or of the validation text where there is none."""
        split = "test" if "test" in self._sequences else "validation"
        if split == "validation":
            rank_zero_warn("There is no test text: the test scores the validation text.")
        return self._evaluation_loader(self._sequences[split], split)

    def predict_dataloader(self) -> StatefulLoader:
        """Return what :meth:`test_dataloader` returns."""
        return self.test_dataloader()

    def _sources(self) -> dict[str, TextSource]:
        if self._found_sources is None:
            self._found_sources = find_sources(self.data, separator=self.document_separator, column=self.text_column)
        return self._found_sources

    def _load(self, split: str) -> None:
        if split not in self._sequences:
            self._sequences[split] = self._pack(split)

    def _load_train(self) -> None:
        if "train" in self._sequences:
            return
        found = {"train": self._pack("train")}
        if "validation" not in self._sources():
            found = self._held_out(found["train"])
        self._sequences |= {**found, "train": self._limited(found["train"])}

    def _tokens(self, split: str) -> list[Tokens]:
        if split not in self._documents:
            sources = self._sources()
            if split not in sources:
                raise FiftyfoldError(f"{self.data} has no {split} text, only {', '.join(sources)}.")
            self._documents[split] = tokenize_documents(
                sources[split], self.tokenizer, split=split, cache_folder=self.cache_folder
            )
        return self._documents[split]

    def _pack(self, split: str) -> PackedSequences:
        row = join_documents(self._tokens(split), self.tokenizer, self.objective)
        prefix = [self.tokenizer.cls_token_id] if self.objective == "masked" else []
        suffix = [self.tokenizer.sep_token_id] if self.objective == "masked" else []
        sequences = PackedSequences(
            row,
            self.sequence_length,
            [token for token in prefix if token is not None],
            [token for token in suffix if token is not None],
        )
        if len(sequences) == 0:
            raise FiftyfoldError(
                f"the {split} text of {self.data} has {len(row)} tokens, less than one sequence of "
                f"{self.sequence_length}; give more text or a smaller sequence_length."
            )
        return sequences

    def _held_out(self, whole: PackedSequences) -> dict[str, PackedSequences]:
        kept = len(whole) - max(1, round(HELD_OUT_SHARE * len(whole)))
        if kept < 1:
            raise FiftyfoldError(f"{self.data} fills one sequence only and has no validation text; give more text.")
        return {"train": whole.part(slice(0, kept)), "validation": whole.part(slice(kept, None))}

    def _limited(self, whole: PackedSequences) -> PackedSequences:
        if self.limit_train is None or self.limit_train >= len(whole):
            return whole
        chosen = np.random.default_rng(self.seed).permutation(len(whole))[: self.limit_train]
        return whole.part(np.sort(chosen))

    def _evaluation_loader(self, sequences: PackedSequences, split: str) -> StatefulLoader:
        place = place_of(self.trainer)
        if len(sequences) < place["world_size"]:
            raise FiftyfoldError(
                f"the {split} text fills {len(sequences)} sequences for {place['world_size']} processes; use fewer "
                "devices."
            )
        batches = plan_evaluation_batches(
            len(sequences), self.eval_batch_size, rank=place["rank"], world_size=place["world_size"]
        )
        return self._loader(sequences, same_every_epoch(batches), {})

    def _loader(
        self,
        sequences: PackedSequences,
        plan: Callable[[int], list[list[int]]],
        signature: dict[str, int | bool],
    ) -> StatefulLoader:
        collate: Callable[[Any], Batch] = causal_batch
        if self.objective == "masked":
            collate = MaskingCollator(self.tokenizer, self.mask_share, self.seed)
        return StatefulLoader(
            sequences,
            plan,
            collate,
            signature=signature,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _plan_epoch(epoch: int, examples: int, **arguments: Any) -> list[list[int]]:
    batches = plan_training_batches(examples, epoch=epoch, **arguments)
    # Beyond the last sequence an index means the same one in a later epoch: its mask is then another.
    return [[epoch * examples + index for index in batch] for batch in batches]
