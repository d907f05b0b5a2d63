"""Activation-aware tensor networks at a chosen moment of training."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from fiftyfold.callbacks.calibration_loader import undisturbed
from fiftyfold.callbacks.moment import Moment, When
from fiftyfold.callbacks.operation_callback import Event, OperationCallback, operation_callbacks
from fiftyfold.callbacks.quantization_aware_training import QuantizationAwareTraining
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.calibration import calls_of
from fiftyfold.modules.quantization.quantize import OPERATION as QUANTIZATION
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import Operation, compression_root, structure_log
from fiftyfold.modules.surgery import plain_name
from fiftyfold.modules.tensor_network.budget import DENSE_BYTES, Allocation
from fiftyfold.modules.tensor_network.compress_matrices import (
    OPERATION,
    Compression,
    CompressionArguments,
    check_arguments,
    plan_compression,
)
from fiftyfold.modules.tensor_network.compressed_matrix import FAMILIES_BY_DEFAULT
from fiftyfold.modules.tensor_network.families import Family
from fiftyfold.modules.tensor_network.layers import matrix_shape
from fiftyfold.modules.tensor_network.progress import ends_a_tenth
from fiftyfold.modules.tensor_network.targets import find_matrices

_PATIENCE = timedelta(days=7)

_Found = TypeVar("_Found")
_Calls = tuple[str, list[dict[str, Any]]] | FiftyfoldError


class MatrixCompression(OperationCallback):
    """Replaces weight matrices by the tensor networks that change the layers' outputs least on training batches.

    The batches are the first of a fresh pass over the training data, as the module's own ``training_step`` calls the
    model with them. The first rank compresses by the batches of all ranks, and tells the others. What is to have few
    bits trains on under its quantizers; no other callback need quantize it.

    Args:
        keep: see :func:`fiftyfold.modules.compress_matrices`, as for all the following but three.
        batches: how many batches calibrate, of each rank.
        factor_bits: 16, or 8 for factors that are quantized.
        whole_bits: in which bits a matrix may stay whole.
        allocation: how the bytes are spread over the matrices.
        families: which forms are tried.
        targets: which layers: ``"default"``, or patterns of their names.
        exclude: patterns of names to leave alone.
        start: when; see :data:`~fiftyfold.callbacks.moment.When`.
        work_folder: where the first rank keeps each matrix as soon as it is done, so that a run that is killed
            meanwhile goes on there when it is begun again, or resumed, with the same model and batches up to then; it
            is refused otherwise. Each such callback needs one of its own.
    """

    operation = OPERATION
    changes_shapes = True

    def __init__(
        self,
        keep: float = 0.3,
        *,
        batches: int = 16,
        factor_bits: int = 16,
        whole_bits: Sequence[int] = (),
        allocation: Allocation = "model",
        families: Sequence[Family] = FAMILIES_BY_DEFAULT,
        targets: Targets = "default",
        exclude: Targets = (),
        start: When = 0,
        work_folder: str | None = None,
    ) -> None:
        super().__init__()
        if type(batches) is not int or batches < 1:
            raise FiftyfoldError(f"batches must be an integer of at least 1, not {batches!r}.")
        self.keep = keep
        self.batches = batches
        self.start = Moment.parse(start)
        self.work_folder = work_folder
        self.arguments: CompressionArguments = {
            "factor_bits": factor_bits,
            "whole_bits": tuple(whole_bits),
            "allocation": allocation,
            "families": tuple(families),
            "targets": targets if isinstance(targets, str) else tuple(targets),
            "exclude": exclude if isinstance(exclude, str) else tuple(exclude),
        }
        check_arguments(keep, **self.arguments)
        self._found: tuple[str, Compression] | None = None

    @property
    def operations(self) -> tuple[str, ...]:
        """Few bits are quantizers, which nothing that changes shapes can follow."""
        return (OPERATION, QUANTIZATION) if self._has_few_bits else (OPERATION,)

    @property
    def events(self) -> list[Event]:
        """One, named by what it keeps, of which layers, and in which bits if they are few."""
        where = f", targets={self.arguments['targets']!r}, exclude={self.arguments['exclude']!r}"
        if self._has_few_bits:
            where += f", factor_bits={self.arguments['factor_bits']}, whole_bits={self.arguments['whole_bits']}"
        return [Event(self.start, f"MatrixCompression(keep={self.keep}{where})")]

    @property
    def _has_few_bits(self) -> bool:
        return self.arguments["factor_bits"] < 16 or bool(self.arguments["whole_bits"])

    def prepare(self, root: nn.Module, trainer: Trainer) -> None:
        """Refuse strategies that shard: no batch can be had before they do."""
        if self.events[0].name not in {entry.get("by") for entry in structure_log(root)}:
            raise FiftyfoldError(
                f"MatrixCompression needs batches before {type(trainer.strategy).__name__} shards the model; compress "
                "it with compress_matrices before the Trainer gets it, or train with strategy='ddp'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layers that do not exist, or that another callback would give other bits."""
        super().on_train_start(trainer, pl_module)
        root = compression_root(pl_module)
        others = [each for each in operation_callbacks(trainer) if isinstance(each, MatrixCompression)]
        if self.work_folder is not None and [each.work_folder for each in others].count(self.work_folder) > 1:
            raise FiftyfoldError(f"two MatrixCompression share the work folder {self.work_folder!r}; name two.")
        done = [entry["targets"] for entry in structure_log(root) if entry.get("by") == self.events[0].name]
        # A resumed run's layers are no matrices any more.
        chosen = done or [find_matrices(root, self.arguments["targets"], self.arguments["exclude"])]
        mine = set(itertools.chain.from_iterable(chosen))
        for callback in operation_callbacks(trainer) if self._has_few_bits else ():
            if isinstance(callback, QuantizationAwareTraining) and (both := mine & callback.targets_in(root)):
                raise FiftyfoldError(
                    f"MatrixCompression chooses the bits of {min(both)!r}; exclude it from QuantizationAwareTraining."
                )

    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:  # noqa: ARG002
        """Compress a copy, on the first rank, by the batches of all."""
        names = find_matrices(root, self.arguments["targets"], self.arguments["exclude"])
        with undisturbed(trainer) as loader:
            mine = _attempt(lambda: calls_of(root, names, _steps(trainer, itertools.islice(loader, self.batches))))
        found = _gathered(mine)
        self._found = _demand(_found_by_the_first(lambda: _attempt(lambda: self._compress(root, names, found))))
        return self._found[1].operation(trainer.global_step, self._found[0])

    def give_values(self, root: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Fill the networks."""
        assert self._found is not None
        part, compression = self._found
        compression.give_values(_part(root, part), optimizers)

    def follow_ups(self, root: nn.Module, trainer: Trainer) -> list[Operation]:
        """Put what is to have few bits under its quantizers."""
        assert self._found is not None
        return self._found[1].quantizing(root, trainer.global_step, self._found[0])

    def describe(self, operation: Operation, root: nn.Module) -> str:  # noqa: ARG002
        """Count the layers, and compare their bytes with those of their matrices."""
        assert self._found is not None
        part, compression = self._found
        self._found = None
        layers = dict(named_layers(_part(root, part)))
        dense = sum(DENSE_BYTES * math.prod(matrix_shape(layers[name])) for name in compression.values)
        left = sum(compression.results[name].bytes for name in compression.values)
        whole = sum(compression.results[name].whole_bits is not None for name in compression.values)
        kept = f" ({whole} of them whole, in few bits)" if whole else ""
        return f"compressed {len(compression.values)} layers{kept} to {left / dense:.1%} of their bytes in 16 bits."

    def _compress(self, root: nn.Module, names: Sequence[str], found: Sequence[_Calls]) -> tuple[str, Compression]:
        part = _demand(found[0])[0]
        calls = [call for each in found for call in _demand(each)[1]]
        exact = [f"^{re.escape(name[len(part) + 1 :] if part else name)}$" for name in names]
        arguments: CompressionArguments = {**self.arguments, "targets": exact, "exclude": ()}
        return part, plan_compression(
            _part(root, part), calls, self.keep, report=_tell, work_folder=self.work_folder, **arguments
        )


def _steps(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Callable[[], object]]:
    step = trainer.lightning_module.training_step
    counted = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    for index, batch in enumerate(batches):
        given = trainer.strategy.batch_to_device(batch)
        yield functools.partial(step, given, index) if counted else functools.partial(step, given)


def _tell(what: str, done: int, total: int) -> None:
    """Log at each tenth that compressing goes on, while the run stands still."""
    if ends_a_tenth(done, total):
        rank_zero_info(f"MatrixCompression: {what} {done} of {total} matrices.")


def _attempt(find: Callable[[], _Found]) -> _Found | FiftyfoldError:
    """Return an error as a value, so that all ranks come to know of it."""
    try:
        return find()
    except FiftyfoldError as error:
        return error


def _demand(found: _Found | FiftyfoldError) -> _Found:
    if isinstance(found, FiftyfoldError):
        raise found
    return found


def _gathered(mine: _Calls) -> list[_Calls]:
    """Return what each rank found, in their order."""
    if not dist.is_initialized():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, move_data_to_device(mine, "cpu"))
    return found


def _found_by_the_first(find: Callable[[], _Found]) -> _Found:
    """Return what the first rank finds; the others wait for it, however long that takes."""
    if not dist.is_initialized():
        return find()
    # The ranks' own group gives up after half an hour, or less.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        outcome: list[Any] = [find() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=group)
    finally:
        dist.destroy_process_group(group)
    found: _Found = outcome[0]
    return found


def _part(root: nn.Module, name: str) -> nn.Module:
    named: Iterable[tuple[str, nn.Module]] = root.named_modules()
    return next(module for found, module in named if plain_name(found) == name)
