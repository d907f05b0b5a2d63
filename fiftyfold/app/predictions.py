"""What ``fiftyfold predict`` writes: a line for every row of the data's file, in GLUE's form of a submission."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from fiftyfold.errors import FiftyfoldError
from fiftyfold.file_replacement import created_file
from fiftyfold.modules.task_module import TaskModule

FILE_NAME = "predictions.tsv"


class PredictionWriter(Callback):
    """Writes what a classifier predicts; of several sets, each into a file with the set's name in its own.

    Args:
        file: the file to write; by default :data:`FILE_NAME` in the run's folder.

    Raises:
        FiftyfoldError: if there is such a file, before anything is predicted.
    """

    def __init__(self, file: str | None = None) -> None:
        self._file = file
        self._files: list[Path] = []
        self._predicted: list[list[int | float]] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All ranks ask for the folder: Lightning lets the first one tell the others.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        file = folder / FILE_NAME if self._file is None else Path(self._file).expanduser()
        self._files = _files_of(file, trainer)
        self._predicted = [[] for _ in self._files]
        # One rank looks, so that all refuse or none.
        taken = trainer.strategy.broadcast([str(each) for each in self._files if each.exists()])
        if taken:
            raise _already_there(taken[0])

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._predicted[dataloader_idx] += outputs.tolist()

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        names = _label_names(pl_module)
        for file, own in zip(self._files, self._predicted, strict=True):
            rows = _rows_of_all_ranks(own, trainer)
            if trainer.is_global_zero:
                _write(file, rows, names)
                print(f"{file}: {len(rows)} predictions")


def _files_of(file: Path, trainer: Trainer) -> list[Path]:
    count = len(trainer.num_predict_batches)
    if count == 1:
        return [file]
    sets = getattr(getattr(trainer, "datamodule", None), "predicted_splits", range(count))
    return [file.with_stem(f"{file.stem}_{name}") for name in sets]


def _label_names(module: TaskModule) -> Sequence[str] | None:
    """Return the names of the classes by index, the task's own before the model's; None for a regression."""
    config, task = module.trained_model.config, module.task
    if task.num_labels == 1:
        return None
    return list(task.label_names) or [str(config.id2label[index]) for index in range(task.num_labels)]


def _rows_of_all_ranks(own: list[int | float], trainer: Trainer) -> list[tuple[int, int | float]]:
    """Return what is predicted by row of the file; rank r of n has the rows r, r + n, r + 2n and so on."""
    parts: list[list[int | float]] = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(parts, own)
    shares = (_rows_of_rank(part, rank, trainer.world_size) for rank, part in enumerate(parts))
    return sorted(chain.from_iterable(shares))


def _rows_of_rank(part: list[int | float], rank: int, ranks: int) -> Iterator[tuple[int, int | float]]:
    return ((rank + ranks * place, predicted) for place, predicted in enumerate(part))


def _write(file: Path, rows: list[tuple[int, int | float]], names: Sequence[str] | None) -> None:
    lines = [f"{index}\t{f'{value:.6g}' if names is None else names[int(value)]}\n" for index, value in rows]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with created_file(file) as target:
            target.write("".join(["index\tprediction\n", *lines]).encode())
    except FileExistsError as error:
        raise _already_there(file) from error
    except OSError as error:
        raise FiftyfoldError(
            f"the predictions {file} cannot be written ({error.strerror or error}); free some space or name another "
            "file with --predictions."
        ) from error


def _already_there(file: str | Path) -> FiftyfoldError:
    return FiftyfoldError(f"{file} is there already; name another file with --predictions, or move that one away.")
