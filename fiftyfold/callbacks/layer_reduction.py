"""Layer reduction at a chosen moment of training."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import nn

from fiftyfold.callbacks.moment import Moment, When
from fiftyfold.callbacks.operation_callback import Event, OperationCallback
from fiftyfold.modules.layer_reduction import OPERATION, choose_layers, reduction
from fiftyfold.modules.structure import Operation


class LayerReduction(OperationCallback):
    """Keeps some of a model's layers and drops the others, once.

    Args:
        layers: ``"every-other"``, ``"first"``, ``"last"``, or a rising list of the layers that stay, counted from 0.
        keep: how many stay, for the named choices; half of them by default.
        start: when; see :data:`~fiftyfold.callbacks.moment.When`.
    """

    operation = OPERATION
    changes_shapes = True

    def __init__(self, layers: str | Sequence[int] = "every-other", keep: int | None = None, start: When = 0) -> None:
        super().__init__()
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.keep = keep
        self.start = Moment.parse(start)

    @property
    def events(self) -> list[Event]:
        """The one reduction."""
        keep = "" if self.keep is None else f", keep={self.keep}"
        return [Event(self.start, f"LayerReduction({self.layers!r}{keep})")]

    def layers_after(self, event: Event, total: int) -> int:  # noqa: ARG002
        """Count the layers that would be chosen of ``total``."""
        return len(choose_layers(self.layers, total, self.keep))

    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:  # noqa: ARG002
        """Choose the layers among those that ``root`` has now."""
        return reduction(root, self.layers, self.keep, step=trainer.global_step)

    def describe(self, operation: Operation, root: nn.Module) -> str:  # noqa: ARG002
        """Name the layers that stayed."""
        return f"kept layers {operation['layers']} of {operation['of']} in {operation['stack']!r}."
