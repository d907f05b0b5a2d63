"""Packed layers that read the same tensor, as query, key and value do, as one product while a model is traced.

A traced program then quantizes their input once and calls one operator in place of several. No output changes by a bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fiftyfold.kernels.backends import PACKED_BITS
from fiftyfold.kernels.packing import pack_codes
from fiftyfold.modules.packed.layers import PackedLinear


@contextmanager
def one_product_for_shared_inputs(model: nn.Module, call: Callable[[], Sequence[torch.Tensor]]) -> Iterator[int]:
    """Let layers that read the same tensor be parts of one product, if the model computes the same bits so.

    Args:
        model: in evaluation mode; its layers are as they were afterwards.
        call: calls the model, and returns its outputs.

    Yields:
        How many products stand for several layers.
    """
    products, before = [_Product(layers) for layers in _groups(model, call)], call()
    with ExitStack() as replaced:
        for product in products:
            replaced.enter_context(product.standing_in())
        if not _same(call, before):
            products = []
            replaced.close()
        yield len(products)


class _Product:
    """One packed layer for several. The first of them that is called computes it; the others take their parts."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers = layers
        self._joined = _joined(layers)
        self._known: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the layer at a place."""
        if self._known is None or self._known[0] is not x:
            outputs: torch.Tensor = self._joined(x)
            self._known = x, outputs.split([layer.rows for layer in self._layers], dim=-1)
        return self._known[1][place]

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the layers take their parts from here."""
        try:
            for place, layer in enumerate(self._layers):
                layer.forward = partial(self.part, place)  # type: ignore[method-assign]
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def _groups(model: nn.Module, call: Callable[[], object]) -> list[list[PackedLinear]]:
    """Return the layers that read one tensor in one way, and are called once."""
    calls: list[tuple[PackedLinear, torch.Tensor]] = []  # a tensor that lives shares its number with no other

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, PackedLinear)
        calls.append((layer, arguments[0]))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                hooks.callback(module.register_forward_pre_hook(note).remove)
        call()
    counts = Counter(layer for layer, _ in calls)
    found: dict[Hashable, list[PackedLinear]] = {}
    for layer, x in calls:
        if counts[layer] == 1 and _can_join(layer):
            found.setdefault((id(x), *_way(layer)), []).append(layer)
    return [layers for layers in found.values() if len(layers) > 1]


def _can_join(layer: PackedLinear) -> bool:
    activation = layer.settings.activation
    # A static range is each layer's own.
    return activation is not None and activation.range == "dynamic" and layer.settings.weight.bits in PACKED_BITS


def _way(layer: PackedLinear) -> tuple[Hashable, ...]:
    """Return what layers must have in common to be joined."""
    bias = None if layer.bias is None else layer.bias.dtype
    return layer.settings.activation, layer.settings.weight.bits, layer.weight_scale.shape[1], layer.columns, bias


def _joined(layers: Sequence[PackedLinear]) -> PackedLinear:
    """Return one layer with the outputs of several, one after another."""
    first, rows = layers[0], sum(layer.rows for layer in layers)
    weight = first.settings.weight
    if weight.granularity == "per_tensor":
        weight = replace(weight, granularity="per_channel")
    biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    settings = replace(first.settings, weight=weight)
    joined = PackedLinear(rows, first.columns, settings, bias, first.weight.device)
    scales = [layer.weight_scale.expand(layer.rows, -1) for layer in layers]
    joined.weight_scale = torch.cat(scales)
    joined.weight.data = pack_codes(torch.cat([layer.unpacked() for layer in layers]), weight.bits)
    joined.prepare()
    return joined.eval()


def _same(call: Callable[[], Sequence[torch.Tensor]], before: Sequence[torch.Tensor]) -> bool:
    with suppress(RuntimeError):  # of a model that needs its layers' outputs to be contiguous
        return all(map(torch.equal, call(), before))
    return False
