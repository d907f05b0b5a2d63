"""Layer pruning: dropping the layers that do least, by a measured importance.

A layer's importance is its *block influence*, 1 - cos(input, output), averaged over the tokens that are not padding
(Men et al. 2024, "ShortGPT", equation 1): a layer that returns what it was given can go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.layer_reduction import OPERATION
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack
from fiftyfold.modules.structure import Operation, apply_operation

_ONE = 2**24
"""Cosines are added as whole numbers of this unit: any order of adding, over ranks or resumes, gives the same sum."""


class ImportanceMeter:
    """Listens to the layers of a stack and sums up how much each one changes its tokens.

    The hooks stay on the layers between measurements, because ``torch.compile`` does not notice hooks that come later;
    ``active`` says whether they count.

    Args:
        stack: the layers. Those that are dropped from it later are no longer asked for.
    """

    def __init__(self, stack: nn.ModuleList) -> None:
        self.stack = stack
        self.active = False
        self.mask: torch.Tensor | None = None
        """Real tokens of the current batch, ``[batch, length]``, not 0 where real; ``None`` counts every token."""
        self._totals: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self._listen, with_kwargs=True) for layer in stack
        ]

    @property
    def totals(self) -> torch.Tensor:
        """Sum of cosines in units of 2^-24, and number of tokens, of each layer of the stack; int64 ``[layers, 2]``."""
        device = next(self.stack.parameters()).device
        nothing = torch.zeros(2, dtype=torch.int64, device=device)
        return torch.stack([self._totals.get(layer, nothing).to(device) for layer in self.stack])

    @totals.setter
    def totals(self, totals: torch.Tensor) -> None:
        for layer, total in zip(self.stack, totals, strict=True):
            self._totals[layer] = total.clone()

    def reset(self) -> None:
        """Forget what was measured."""
        self._totals.clear()

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _listen(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.active:
            self._count(layer, _first_tensor((*args, *kwargs.values())), _first_tensor((output,)))

    @torch.compiler.disable
    @torch.no_grad()
    def _count(self, layer: nn.Module, before: torch.Tensor, after: torch.Tensor) -> None:
        cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
        if self.mask is not None and self.mask.shape == cosines.shape:
            cosines = cosines[self.mask.to(cosines.device) != 0]
        units = torch.nan_to_num(cosines * _ONE).round().to(torch.int64).sum()
        total = torch.stack([units, torch.full_like(units, cosines.numel())])
        self._totals[layer] = self._totals.get(layer, torch.zeros_like(total)).to(total.device) + total


def importance(totals: torch.Tensor) -> list[float]:
    """Turn the totals of an :class:`ImportanceMeter` into each layer's importance, between 0 and 2.

    Raises:
        FiftyfoldError: if some layer has seen no token.
    """
    if not bool((totals[:, 1] > 0).all()):
        raise FiftyfoldError("no layer can be pruned before some training batches have measured each one's importance.")
    cosines, tokens = totals.double().cpu().unbind(dim=1)
    return [float(value) for value in 1 - cosines / _ONE / tokens]


def measure_importance(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """Measure the importance of each layer of ``model``.

    Args:
        model: called as ``model(**batch)``, in eval mode and without gradients.
        batches: keyword arguments; ``attention_mask`` ``[batch, length]`` says which tokens count.

    Returns:
        One number a layer, 0 for a layer that changes no direction.

    Raises:
        FiftyfoldError: if there are no batches.
    """
    meter = ImportanceMeter(layer_stack(model, find_layer_stack(model)))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    meter.active = True
    try:
        with torch.no_grad():
            for batch in batches:
                meter.mask = batch.get("attention_mask")
                model(**batch)
    finally:
        meter.close()
        for module, training in modes.items():
            module.training = training
    return importance(meter.totals)


def prune_layers(
    model: nn.Module,
    drop: int,
    importance: Sequence[float],
    *,
    step: int = 0,
    optimizer: Optimizer | None = None,
) -> list[int]:
    """Drop the least important layers of ``model`` in place, and record it in its structure log.

    Args:
        model: any module with a stack of layers.
        drop: number of layers that go.
        importance: one number a layer, as :func:`measure_importance` gives it.
        step: optimizer step at which this happens, for the log.
        optimizer: the optimizer that trains ``model``, if there is one; dropped parameters leave it.

    Returns:
        The indices of the layers that stayed.

    Raises:
        FiftyfoldError: if the stack is not found, or if no layer would be left.
    """
    operation = pruning(model, drop, importance, step=step)
    apply_operation(model, operation, () if optimizer is None else (optimizer,))
    return list(operation["layers"])


def pruning(model: nn.Module, drop: int, importance: Sequence[float], *, step: int = 0) -> Operation:
    """Return the log's entry for :func:`prune_layers` on ``model``, without carrying it out."""
    stack = find_layer_stack(model)
    total = len(layer_stack(model, stack))
    if not 1 <= drop < total:
        raise FiftyfoldError(f"cannot drop {drop} of {total} layers; drop 1 to {total - 1}.")
    if len(importance) != total:
        raise FiftyfoldError(f"{len(importance)} importances for {total} layers; give one a layer.")
    # Among equals the deeper layer goes.
    order = sorted(range(total), key=lambda index: (importance[index], -index))
    return {
        "op": OPERATION,
        "stack": stack,
        "layers": sorted(order[drop:]),
        "of": total,
        "importance": [float(value) for value in importance],
        "step": step,
    }


def _first_tensor(values: Iterable[Any]) -> torch.Tensor:
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, tuple):
            return _first_tensor(value)
    raise FiftyfoldError("the layers neither take nor return a tensor; their importance cannot be measured.")
