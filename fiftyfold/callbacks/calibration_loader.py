"""A second pass over a Trainer's training data that does not disturb the first."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from fiftyfold.errors import FiftyfoldError


@contextlib.contextmanager
def undisturbed(trainer: Trainer, seed: int = 0) -> Iterator[Iterable[Any]]:
    """Give a fresh pass over the training data inside the block, the same one whenever it is asked for.

    Each of several processes gets batches of its own, as far as there are enough. Random numbers go on after the block
    as if it had not been.

    Args:
        trainer: in training.
        seed: of the random numbers inside the block.

    Raises:
        FiftyfoldError: if the data can be read only once at a time.
    """
    with isolate_rng():
        torch.manual_seed(seed)
        source = trainer.fit_loop._data_source
        if source.is_module():
            yield _own_share(source.dataloader(), trainer)
            return
        loader = trainer.train_dataloader
        if type(loader) is not DataLoader:
            raise FiftyfoldError(
                f"the training data come from a {type(loader).__name__}, which may not be read twice at a time; "
                "give them by a LightningDataModule or by the module's train_dataloader."
            )
        generators = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
        states = [generator.get_state() for generator in generators.values()]
        try:
            yield _twin(loader)
        finally:
            for generator, state in zip(generators.values(), states, strict=True):
                generator.set_state(state)


def _own_share(loader: Any, trainer: Trainer) -> Iterable[Any]:
    """Return this process's share of the batches of a loader to which Lightning would give a distributed sampler."""
    plain = isinstance(loader, DataLoader) and trainer._data_connector._requires_distributed_sampler(loader)
    if not plain or len(loader) < trainer.world_size:
        return loader  # type: ignore[no-any-return]
    return itertools.islice(loader, trainer.global_rank, None, trainer.world_size)


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of the same batches that shares no worker with ``loader``."""
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=loader.sampler, collate_fn=loader.collate_fn)
    return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
