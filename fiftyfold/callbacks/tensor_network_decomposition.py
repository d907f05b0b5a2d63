"""Tensorization at a chosen moment of training, or gradually over several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from fiftyfold.callbacks.moment import Moment, When, read_schedule
from fiftyfold.callbacks.operation_callback import Event, OperationCallback
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.targets import Targets
from fiftyfold.modules.structure import Operation, compression_root
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import (
    OPERATION,
    Split,
    TensorizeArguments,
    check_arguments,
    read_forms,
    tensorize_operation,
)


class TensorNetworkDecomposition(OperationCallback):
    """Replaces weight matrices by matrix product operators, whose cores then train in their place.

    Several such callbacks may tensorize different layers of one model, each at its own time.

    Args:
        cores: see :func:`fiftyfold.modules.tensorize`, as for all the following.
        bond_dimension: size of the bonds; or sizes that step down, by the moment at which they begin, e.g.
            ``{0: 64, "fraction:0.1": 32, "fraction:0.2": 16}``; see :data:`~fiftyfold.callbacks.moment.When`.
        keep: a share of each matrix's numbers instead of ``bond_dimension``.
        split: ``"even"`` or ``"low_rank"``.
        targets: which layers: ``"default"``, or patterns of their names.
        exclude: patterns of names to leave alone.
        start: when, if ``bond_dimension`` is one number.
    """

    operation = OPERATION
    changes_shapes = True
    steps_down = True

    def __init__(
        self,
        cores: int = 3,
        bond_dimension: int | Mapping[str, int] | Mapping[int, int] | Mapping[When, int] = 64,
        *,
        keep: float | None = None,
        split: Split = "even",
        targets: Targets = "default",
        exclude: Targets = (),
        start: When = 0,
    ) -> None:
        super().__init__()
        if isinstance(bond_dimension, Mapping):
            if start != 0 or keep is not None or not bond_dimension:
                raise FiftyfoldError(
                    "a bond_dimension that steps down says when each size begins; leave start and keep out."
                )
            self.bond_dimension = read_schedule(bond_dimension, "TensorNetworkDecomposition(bond_dimension=...)")
        else:
            self.bond_dimension = {Moment.parse(start): bond_dimension}
        for size in self.bond_dimension.values():
            check_arguments(cores, size, keep, split)
        self.arguments: TensorizeArguments = {
            "cores": cores,
            "keep": keep,
            "split": split,
            "targets": targets if isinstance(targets, str) else tuple(targets),
            "exclude": exclude if isinstance(exclude, str) else tuple(exclude),
        }

    @property
    def events(self) -> list[Event]:
        """One for each bond dimension, named by it and by what is not as by default."""
        defaults = inspect.signature(tensorize_operation).parameters
        how = "".join(
            f", {name}={value!r}" for name, value in self.arguments.items() if value != defaults[name].default
        )
        return [
            Event(moment, f"TensorNetworkDecomposition(bond_dimension={size}{how})")
            for moment, size in self.bond_dimension.items()
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be done later: bonds that grow, layers that do not exist."""
        super().on_train_start(trainer, pl_module)
        sizes = [self.bond_dimension[event.moment] for _, event in self._due]
        if sizes != sorted(sizes, reverse=True):
            raise FiftyfoldError(f"TensorNetworkDecomposition: the bonds must step down, not go {sizes}.")
        find_matrices(compression_root(pl_module), self.arguments["targets"], self.arguments["exclude"])

    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:
        """Find the layers that ``root`` has now."""
        size = self.bond_dimension[event.moment]
        arguments: TensorizeArguments = {**self.arguments, "bond_dimension": size}
        return tensorize_operation(root, step=trainer.global_step, **arguments)

    def describe(self, operation: Operation, root: nn.Module) -> str:  # noqa: ARG002
        """Count the layers, and compare their numbers with those of their matrices."""
        forms = read_forms(operation).values()
        numbers, dense = sum(form.count for form in forms), sum(form.shape[0] * form.shape[1] for form in forms)
        return f"tensorized {len(forms)} layers, from {dense} to {numbers} numbers ({numbers / dense:.1%})."
