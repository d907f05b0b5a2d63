"""A loader whose order is a function of seed and epoch, and which resumes in mid-epoch at the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from fiftyfold.errors import FiftyfoldError

_GROUPED_BATCHES = 50

Batch = dict[str, torch.Tensor]


class IndexedSource(Protocol):
    """What the loader reads from: rows by a list of indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int], /) -> Any: ...


def plan_training_batches(
    examples: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    lengths: Sequence[int] | np.ndarray[Any, Any] | None = None,
) -> list[list[int]]:
    """Lay out one epoch of training for one process.

    Every process gets the same number of batches, and together they see every example once. Only if fewer examples
    than processes are left for the last batch is it dropped.

    Args:
        examples: number of examples in the split.
        batch_size: examples per batch and process.
        seed: fixes the order, together with the epoch.
        epoch: the epoch, from 0.
        rank: this process.
        world_size: number of processes.
        shuffle: whether to shuffle.
        lengths: tokens per example. If given, examples of similar length share a batch, as far as blocks of 50
            shuffled batches allow; the batches' order stays random.

    Returns:
        Indices of the examples of each batch.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(examples) if shuffle else np.arange(examples)
    step = batch_size * world_size
    if lengths is not None:
        block = step * _GROUPED_BATCHES
        sizes = np.asarray(lengths)
        order = np.concatenate([_sort(order[i : i + block], sizes) for i in range(0, examples, block)])
    batches = [order[i : i + step] for i in range(0, examples, step)]
    if lengths is not None and shuffle:
        # the short batch stays the last one
        full = examples // step
        batches = [batches[i] for i in generator.permutation(full)] + batches[full:]
    return [batch[rank::world_size].tolist() for batch in batches if len(batch) >= world_size]


def plan_evaluation_batches(
    examples: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    lengths: Sequence[int] | np.ndarray[Any, Any] | None = None,
) -> list[list[int]]:
    """Lay out one pass of evaluation: every example exactly once over all processes, none twice.

    Args:
        examples: number of examples in the split.
        batch_size: examples per batch and process.
        rank: this process.
        world_size: number of processes.
        lengths: tokens per example. If given, the longest come first, which needs the least padding and shows at once
            whether the memory suffices.
    """
    order = np.arange(examples)
    if lengths is not None:
        order = _sort(order, np.asarray(lengths))
    own = order[rank::world_size]
    return [own[i : i + batch_size].tolist() for i in range(0, len(own), batch_size)]


def place_of(trainer: Trainer | None) -> dict[str, int]:
    """Return ``rank`` and ``world_size`` of this process, as the plans take them; without a Trainer it is alone."""
    if trainer is None:
        return {"rank": 0, "world_size": 1}
    return {"rank": trainer.global_rank, "world_size": trainer.world_size}


def same_every_epoch(batches: list[list[int]]) -> Callable[[int], list[list[int]]]:
    """Return the plan whose every epoch is ``batches``."""
    return partial(_whatever_the_epoch, batches)


def _whatever_the_epoch(batches: list[list[int]], _epoch: int) -> list[list[int]]:
    return batches


def _sort(indices: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return indices[np.argsort(-lengths[indices], kind="stable")]


class _Epoch:
    """Which epoch it is; Lightning calls ``loader.batch_sampler.sampler.set_epoch`` before each one."""

    def __init__(self) -> None:
        self.number = 0
        self.batches_done = 0

    @property
    def sampler(self) -> _Epoch:
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.number:
            self.number = epoch
            self.batches_done = 0


class StatefulLoader:
    """Yields the batches of a plan, and knows how far it has come.

    Lightning saves the state of such a loader in its checkpoints and hands it back on resume. The state belongs to all
    processes alike. Neither the plan nor the loading draws from torch's global random numbers, so a resumed run finds
    them as the interrupted one left them. The loader is no :class:`~torch.utils.data.DataLoader` and shares the
    examples out among processes itself: Lightning adds no sampler of its own.

    Args:
        source: the examples; indexed with a list of indices.
        plan: gives the batches of an epoch, as lists of indices.
        collate: turns what ``source`` gives for one batch into tensors.
        signature: what fixes the order besides the epoch (seed, batch size, …), by name. A checkpoint taken in
            mid-epoch under another signature is refused.
        num_workers: processes that prepare batches in advance.
        pin_memory: whether batches are put into page-locked memory, for quicker copies to a GPU.
    """

    def __init__(
        self,
        source: IndexedSource,
        plan: Callable[[int], list[list[int]]],
        collate: Callable[[Any], Batch],
        *,
        signature: dict[str, int | bool],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source = source
        self.plan = plan
        self.collate = collate
        self.signature = signature
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.batch_sampler = self._epoch = _Epoch()
        self._length = len(plan(0))
        self._resume_at = 0

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to yield next. Lightning does this by itself."""
        self._epoch.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        # A generator looks at the epoch when its first batch is asked for: Lightning names the epoch after iter().
        start = self._resume_at if self._epoch.batches_done == self._resume_at else 0
        self._resume_at = 0
        self._epoch.batches_done = start
        for batch in self._load(self.plan(self._epoch.number)[start:]):
            self._epoch.batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its batches were yielded already, and of how many, and the signature."""
        return {
            "epoch": self._epoch.number,
            "batches": self._epoch.batches_done,
            "length": len(self),
            "signature": dict(self.signature),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that a former loader yielded.

        Raises:
            FiftyfoldError: in mid-epoch, if the order is not the same any more; or if it is no such state.
        """
        if not _is_state(state):
            raise FiftyfoldError("the checkpoint's place in the data cannot be read; the checkpoint is corrupt.")
        length = state.get("length", len(self))  # older checkpoints do not tell
        finished = state["batches"] >= max(1, length)
        if state["batches"] > 0 and not finished:
            self._check_signature(state["signature"])
        self._epoch.number = state["epoch"]
        # A finished epoch stays one, also where an epoch has more or fewer batches now.
        self._epoch.batches_done = self._resume_at = len(self) if finished else state["batches"]

    def _check_signature(self, saved: dict[str, int | bool]) -> None:
        changed = [
            f"{name} {saved.get(name)} instead of {value}"
            for name, value in self.signature.items()
            if saved.get(name) != value
        ]
        if changed:
            raise FiftyfoldError(
                f"The checkpoint was taken in the middle of an epoch with {', '.join(changed)}, so its place in the"
                " data cannot be found again; resume with the same values, or from a checkpoint at an epoch's end."
            )

    def _load(self, batches: list[list[int]]) -> Iterator[Batch]:
        if self.num_workers == 0:
            for indices in batches:
                batch = self.collate(self.source[indices])
                yield {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch
            return
        # A DataLoader without a generator of its own draws a number from torch's global one.
        generator = torch.Generator().manual_seed(self._epoch.number)
        yield from DataLoader(
            _Batches(self.source, self.collate, batches),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=generator,
        )


def _is_state(state: object) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("signature"), dict):
        return False
    counts = [state.get("epoch"), state.get("batches"), state.get("length", 0)]
    return all(type(count) is int and count >= 0 for count in counts)


class _Batches(torch.utils.data.Dataset[Batch]):
    """The batches of one epoch, for workers to take by number."""

    def __init__(self, source: IndexedSource, collate: Callable[[Any], Batch], batches: list[list[int]]) -> None:
        self.source = source
        self.collate = collate
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.collate(self.source[self.batches[index]])
