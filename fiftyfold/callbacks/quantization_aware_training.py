"""Quantization-aware training from a chosen moment on."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from fiftyfold.callbacks.moment import Moment, When, read_schedule
from fiftyfold.callbacks.operation_callback import Event, OperationCallback, operation_callbacks
from fiftyfold.callbacks.weight_averages import averaged_copies
from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.layers import is_eligible
from fiftyfold.modules.quantization.quantize import QuantizeArguments, install_quantizers, quantize_operation
from fiftyfold.modules.quantization.ranges import copy_ranges, share_ranges
from fiftyfold.modules.quantization.settings import ActivationRange, Granularity
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import Operation, compression_root


class QuantizationAwareTraining(OperationCallback):
    """Trains a model under quantizers: full-precision weights, low-bit forward passes, straight-through gradients.

    The parameters stay the objects that they are, so that quantization may begin, or become coarser, at any step.
    Several such callbacks may quantize different layers of one model.

    Args:
        weight_bits: 1, 2, 3, 4 or 8; or bits that step down, by the moment at which they begin, e.g.
            ``{0: 8, "fraction:0.3": 4, "fraction:0.6": 2}``; see :data:`~fiftyfold.callbacks.moment.When`.
        activation_bits: of the inputs of linear layers, 4 or 8; ``None`` leaves them in full precision.
        granularity: see :func:`fiftyfold.modules.quantize`, as for all the following.
        group_size: entries in a group, for ``"per_group"``.
        targets: which layers: ``"default"``, ``"xtc"``, or patterns of their names.
        exclude: patterns of names to leave alone.
        symmetric: whether inputs are quantized around zero.
        activation_range: ``"dynamic"`` or ``"static"``.
        full_range: XTC's grid for inputs.
        clip: clamp weights and inputs, without gradient outside.
        start: when, if ``weight_bits`` is one number.
    """

    operation = "quantize"
    changes_shapes = False
    steps_down = True

    def __init__(
        self,
        weight_bits: int | Mapping[str, int] | Mapping[int, int] | Mapping[When, int] = 1,
        *,
        activation_bits: int | None = 8,
        granularity: Granularity = "per_tensor",
        group_size: int | None = None,
        targets: Targets = "default",
        exclude: Targets = (),
        symmetric: bool = True,
        activation_range: ActivationRange = "dynamic",
        full_range: bool = False,
        clip: float | None = None,
        start: When = 0,
    ) -> None:
        super().__init__()
        if isinstance(weight_bits, Mapping):
            if start != 0:
                raise FiftyfoldError("weight_bits already says when each bit width begins; leave start out.")
            self.weight_bits = read_schedule(weight_bits, "QuantizationAwareTraining(weight_bits=...)")
        else:
            self.weight_bits = {Moment.parse(start): weight_bits}
        self.arguments: QuantizeArguments = {
            "activation_bits": activation_bits,
            "granularity": granularity,
            "group_size": group_size,
            "targets": _plain(targets),
            "exclude": _plain(exclude),
            "symmetric": symmetric,
            "activation_range": activation_range,
            "full_range": full_range,
            "clip": clip,
        }

    @property
    def events(self) -> list[Event]:
        """One for each bit width, named by it and by what is not as by default."""
        defaults = inspect.signature(quantize_operation).parameters
        how = "".join(
            f", {name}={value!r}" for name, value in self.arguments.items() if value != defaults[name].default
        )
        return [Event(moment, f"QuantizationAwareTraining({bits}{how})") for moment, bits in self.weight_bits.items()]

    def prepare(self, root: nn.Module, trainer: Trainer) -> None:  # noqa: ARG002
        """Install the quantizers, which do nothing until their time comes."""
        install_quantizers(root, **self._arguments(next(iter(self.weight_bits.values()))))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be done later: bits that rise, layers that do not exist or are claimed twice."""
        super().on_train_start(trainer, pl_module)
        bits = [self.weight_bits[event.moment] for _, event in self._due]
        if bits != sorted(bits, reverse=True):
            raise FiftyfoldError(f"QuantizationAwareTraining: the weights' bits must step down, not go {bits}.")
        root = compression_root(pl_module)
        mine = self.targets_in(root)
        for callback in operation_callbacks(trainer):
            if callback is self:
                break
            if isinstance(callback, QuantizationAwareTraining) and (both := mine & callback.targets_in(root)):
                raise FiftyfoldError(
                    f"two QuantizationAwareTraining callbacks quantize {min(both)!r}; exclude it in one."
                )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Share the observed ranges among the ranks, and hand them to averaged copies.

        The average of a range would creep up from an empty one.
        """
        if trainer.world_size > 1 and self.arguments["activation_range"] == "static":
            share_ranges(compression_root(pl_module), lambda tensor: trainer.strategy.reduce(tensor, reduce_op="max"))
        for copy in averaged_copies(trainer):
            copy_ranges(compression_root(pl_module), compression_root(copy))

    def plan(self, event: Event, root: nn.Module, trainer: Trainer) -> Operation:
        """Find the layers that ``root`` has now."""
        return self._operation(root, self.weight_bits[event.moment], trainer.global_step)

    def describe(self, operation: Operation, root: nn.Module) -> str:
        """Count the layers, and name those that were left alone."""
        bits = operation["settings"][0]["weight"]["bits"]
        layers = [name for name, module in named_layers(root) if is_eligible(module)]
        left = [name for name in layers if name not in operation["targets"]]
        others = Counter(type(module).__name__ for module in root.modules() if _has_matrix(module))
        left += [f"{count} {name}" for name, count in others.items()]
        alone = f"; left alone: {', '.join(left)}" if left else ""
        return f"quantized {len(operation['targets'])} layers to {bits}-bit weights{alone}."

    def targets_in(self, root: nn.Module) -> set[str]:
        """Return the names of the layers that it is to quantize."""
        return set(self._operation(root, next(iter(self.weight_bits.values())), 0)["targets"])

    def _operation(self, root: nn.Module, bits: int, step: int) -> Operation:
        return quantize_operation(root, step=step, **self._arguments(bits))

    def _arguments(self, bits: int) -> QuantizeArguments:
        return {**self.arguments, "weight_bits": bits}


def _has_matrix(module: nn.Module) -> bool:
    """Tell whether ``module`` has weights of its own that no quantizer is made for, such as a convolution's."""
    return not is_eligible(module) and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _plain(patterns: Targets) -> Targets:
    """Lists from a configuration file and tuples from a script are to name the same event."""
    return patterns if isinstance(patterns, str) else tuple(patterns)
