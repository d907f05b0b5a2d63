"""Static ranges of activations across copies of a model: what one observed, and what all ranks did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fiftyfold.modules.quantization.layers import RANGE_BUFFERS, quantized_layers


@torch.no_grad()
def copy_ranges(source: nn.Module, target: nn.Module) -> None:
    """Give the quantized layers of ``target`` the static ranges of those of ``source``, a model of equal structure."""
    for (_, observed), (_, layer) in zip(quantized_layers(source), quantized_layers(target), strict=True):
        for name in RANGE_BUFFERS:
            if name in observed._buffers:
                getattr(layer, name).copy_(getattr(observed, name))


@torch.no_grad()
def share_ranges(model: nn.Module, largest: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give the quantized layers of ``model`` the widest of the ranges that the ranks observed, in one exchange.

    The ranks' ranges were equal before the batch, and a range moves towards what the batch has by a fixed share; so
    the widest one is the range that a single process would have observed on the batches of all ranks.

    Args:
        model: the same structure on every rank.
        largest: returns the element-wise maximum of a tensor over the ranks.
    """
    lows, highs = (ranges(model, name) for name in RANGE_BUFFERS)
    if lows:
        below, above = largest(torch.stack([-torch.stack(lows), torch.stack(highs)]))
        for low, high, down, up in zip(lows, highs, below, above, strict=True):
            low.copy_(-down)
            high.copy_(up)


def ranges(model: nn.Module, name: str) -> list[torch.Tensor]:
    """Return the buffers called ``name`` of the quantized layers of ``model``, in their order."""
    return [layer._buffers[name] for _, layer in quantized_layers(model) if layer._buffers.get(name) is not None]  # type: ignore[misc]
