"""Second moments of layers' inputs, from calibration text, one pass over the batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.targets import named_layers
from fiftyfold.modules.tensor_network.finished_layers import FinishedLayers

Batch = torch.Tensor | Mapping[str, Any]
"""What a model is called with: a tensor, or arguments by name; an ``attention_mask`` says which tokens are real."""

_LARGEST_DOUBLE = 2048


@dataclass
class Moments:
    """What is known of the inputs of one layer, in the original model (x) and in the compressed one (x̂).

    Attributes:
        inputs: E[x̂ x̂ᵀ], centred if the layer has a bias that can take up the mean, (inputs, inputs).
        cross: E[x x̂ᵀ], centred likewise.
        original_mean: E[x], (inputs,); zero if nothing was centred.
        mean: E[x̂], likewise.
    """

    inputs: torch.Tensor
    cross: torch.Tensor
    original_mean: torch.Tensor
    mean: torch.Tensor

    def reordered(self, order: torch.Tensor, *, both: bool) -> Moments:
        """Return the moments of inputs in another order.

        Args:
            order: which input comes to stand at each place, (inputs,).
            both: whether those of the compressed model are to be moved too, or have the order already.
        """
        inputs, cross, mean = self.inputs, self.cross[order], self.mean
        if both:
            inputs, cross, mean = inputs[order][:, order], cross[:, order], mean[order]
        return Moments(inputs, cross, self.original_mean[order], mean)


class _Stop(Exception):  # noqa: N818 - no error: it ends a forward pass that has given what it was run for
    """Ends a forward pass."""


class _Sums:
    def __init__(self, size: int, device: torch.device) -> None:
        kind = torch.float64 if size <= _LARGEST_DOUBLE else torch.float32
        self.count = 0
        self.inputs, self.cross = (torch.zeros(size, size, dtype=kind, device=device) for _ in range(2))
        self.first, self.second = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, original: torch.Tensor | None, compressed: torch.Tensor) -> None:
        y = compressed.to(self.inputs.dtype)
        self.inputs.addmm_(y.T, y)
        self.second += y.sum(0)
        self.count += len(y)
        if original is None:
            self.cross, self.first = self.inputs, self.second
        else:
            x = original.to(self.inputs.dtype)
            self.cross.addmm_(x.T, y)
            self.first += x.sum(0)

    def result(self, centred: bool) -> Moments:
        first, second = (mean / self.count for mean in (self.first, self.second))
        if not centred:
            first, second = torch.zeros_like(first), torch.zeros_like(second)
        kind = self.inputs.dtype
        return Moments(
            self.inputs / self.count - torch.outer(second, second).to(kind),
            self.cross / self.count - torch.outer(first, second).to(kind),
            first,
            second,
        )


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    original: nn.Module | None = None,
    *,
    last: str | None = None,
    finished: Mapping[nn.Module, FinishedLayers] | None = None,
) -> dict[str, Moments]:
    """Run a model over calibration batches and return the moments of the inputs of some of its linear layers.

    Args:
        model: in evaluation mode; perhaps compressed in part.
        names: layers.
        batches: what the model is called with.
        original: the model before compression; by default the model itself.
        last: a layer after whose first call the rest of the forward pass is of no interest.
        finished: what is known of each model's layers before those of these names, which will not change any more.

    Raises:
        FiftyfoldError: if no token reaches a layer, or its inputs are not finite.
    """
    sums: dict[str, _Sums] = {}
    keepers = finished or {}
    for number, batch in enumerate(batches):
        with _running(keepers.get(model), model, names, number):
            compressed = _inputs_of(model, names, batch, last)
        before: dict[str, torch.Tensor] = {}
        if original is not None:
            with _running(keepers.get(original), original, names, number):
                before = _inputs_of(original, names, batch, last)
        for name, values in compressed.items():
            if not bool(values.isfinite().all()):
                raise FiftyfoldError(f"the inputs of {name!r} are not finite on the calibration text.")
            sums.setdefault(name, _Sums(values.shape[1], values.device)).add(before.get(name), values)
    if missing := [name for name in names if name not in sums or not sums[name].count]:
        raise FiftyfoldError(
            f"no token of the calibration text reaches {missing[0]!r}; give batches that are not empty, or exclude it."
        )
    layers = dict(named_layers(model))
    return {name: sums[name].result(getattr(layers[name], "bias", None) is not None) for name in names}


@torch.no_grad()
def call_order(model: nn.Module, names: Sequence[str], batch: Batch) -> list[list[str]]:
    """Return the layers in the order of their calls, those that read one tensor together, as q, k and v do.

    Raises:
        FiftyfoldError: if the model does not call one of them.
    """
    order = call_stages(model, names, batch)
    called = {name for stage in order for name in stage}
    if missing := [name for name in names if name not in called]:
        raise FiftyfoldError(f"the model does not call {missing[0]!r} on the calibration text; exclude it.")
    return order


@torch.no_grad()
def call_stages(model: nn.Module, names: Sequence[str], batch: Batch) -> list[list[str]]:
    """Return what :func:`call_order` does, without the layers that are not called."""
    stages: list[tuple[int, list[str]]] = []
    kept: list[torch.Tensor] = []

    def note(name: str, x: torch.Tensor) -> None:
        kept.append(x)  # while it lives, no other tensor can have its memory
        if stages and stages[-1][0] == x.data_ptr():
            stages[-1][1].append(name)
        else:
            stages.append((x.data_ptr(), [name]))

    with listening(model, names, note):
        call(model, batch)
    return [stage for _, stage in stages]


def call(model: nn.Module, batch: Batch) -> Any:
    """Call a model with a batch, on the device of its parameters, without labels.

    Raises:
        FiftyfoldError: if it holds tokens that the model does not know.
    """
    device = next(model.parameters()).device
    try:
        if isinstance(batch, torch.Tensor):
            return model(batch.to(device))
        arguments = {name: value for name, value in batch.items() if name != "labels"}
        return model(
            **{name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
        )
    except (TypeError, ValueError) as error:
        raise FiftyfoldError(f"the model cannot be called with the calibration batches: {error}.") from error
    except IndexError as error:
        raise FiftyfoldError(
            f"the model cannot read the calibration text ({error}); is it of another vocabulary?"
        ) from error


def check_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Return calibration batches as a list.

    Raises:
        FiftyfoldError: if there are none, they hold nothing, or one is neither a tensor nor arguments by name.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, torch.Tensor | Mapping):
        raise FiftyfoldError(f"batches must be a list of batches, not one {type(batches).__name__}.")
    found = list(batches)
    if wrong := [batch for batch in found if not isinstance(batch, torch.Tensor | Mapping)]:
        raise FiftyfoldError(
            f"batches must be tensors, or arguments by name, not {type(wrong[0]).__name__}; tokenize the text."
        )
    tensors = [batch if isinstance(batch, torch.Tensor) else batch.get("input_ids") for batch in found]
    if not found or all(isinstance(tensor, torch.Tensor) and tensor.numel() == 0 for tensor in tensors):
        raise FiftyfoldError("the calibration text is empty; give at least one batch with tokens.")
    return found


def _running(
    keeper: FinishedLayers | None, model: nn.Module, names: Sequence[str], number: int
) -> AbstractContextManager[None]:
    layers = dict(named_layers(model))
    return nullcontext() if keeper is None else keeper.running([layers[name] for name in names], number)


def _inputs_of(model: nn.Module, names: Sequence[str], batch: Batch, last: str | None) -> dict[str, torch.Tensor]:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found: dict[str, list[torch.Tensor]] = {}

    def note(name: str, x: torch.Tensor) -> None:
        found.setdefault(name, []).append(real_tokens(x, mask))
        if name == last:
            raise _Stop

    with listening(model, names, note), suppress(_Stop):
        call(model, batch)
    return {name: calls[0] if len(calls) == 1 else torch.cat(calls) for name, calls in found.items()}


def real_tokens(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of (…, features) that a mask does not call padding, (tokens, features)."""
    if mask is None or mask.shape != x.shape[:-1]:
        return x.reshape(-1, x.shape[-1])
    return x[mask.to(x.device).bool()]


@contextmanager
def listening(model: nn.Module, names: Sequence[str], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Let ``note`` have the name of each layer that is called, and its input."""
    layers = dict(named_layers(model))
    handles: list[RemovableHandle] = []

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: note(name, arguments[0].detach())

    try:
        handles += [layers[name].register_forward_pre_hook(hook_of(name)) for name in names]
        yield
    finally:
        for handle in handles:
            handle.remove()
