"""Packed layers that read the same tensor, as query, key and value do, as one product while a model is traced.

A traced program then quantizes their input once and calls one operator in place of several. No output changes by a bit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fiftyfold.kernels.operators import arrange_weight
from fiftyfold.modules.packed.layers import PackedConv1D, PackedLinear
from fiftyfold.modules.quantization.integer_product import multiply_integers

Outputs = Sequence[torch.Tensor]


@contextmanager
def one_product_for_shared_inputs(model: nn.Module, call: Callable[[], Outputs]) -> Iterator[None]:
    """Let layers that read the same tensor one after another be parts of one product.

    Each product is tried, and kept if the model computes the same bits with it.

    Args:
        model: in evaluation mode; its layers are as they were afterwards.
        call: calls the model, and returns its outputs.
    """
    groups, before = _groups(model, call), call()
    with ExitStack() as replaced:
        for layers in groups:
            with ExitStack() as trial:
                trial.enter_context(_Product(layers).standing_in())
                if _same(call, before):
                    replaced.enter_context(trial.pop_all())
        yield


class _Product:
    """One product for several layers. The first that is called computes it; the others take their parts."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers, self._settings = layers, layers[0].settings
        codes = torch.cat([layer.unpacked() for layer in layers])
        scales = torch.cat([layer.weight_scale.expand(layer.rows, -1) for layer in layers])
        self._arranged = arrange_weight(codes, scales, self._settings.weight.bits)
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._known: tuple[torch.Tensor, Outputs] | None = None

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the layer at a place."""
        known = self._known
        if known is None or known[0] is not x:
            outputs = multiply_integers(x, self._arranged, self._bias, self._settings)
            known = x, outputs.split([layer.rows for layer in self._layers], dim=-1)
        # A later call of the model may come with the same tensor and other numbers in it.
        self._known = known if place < len(self._layers) - 1 else None
        return known[1][place]

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


@dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        layer: which.
        x: its input, which lives as long as this does, so that no other tensor shares its number.
        version: of the input, which rises whenever its numbers are changed in place; nothing where none is counted.
        way: what layers must have in common to be joined; nothing for one that cannot be.
    """

    layer: PackedLinear
    x: torch.Tensor
    version: int | None
    way: Hashable

    @classmethod
    def of(cls, layer: PackedLinear, x: torch.Tensor) -> _Call:
        return cls(layer, x, None if x.is_inference() else x._version, _way(layer, x))


def _groups(model: nn.Module, call: Callable[[], object]) -> list[list[PackedLinear]]:
    """Return the layers that read one tensor, in one way and one after another, and are called once."""
    calls: list[_Call] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, PackedLinear)
        calls.append(_Call.of(layer, arguments[0]))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                hooks.callback(module.register_forward_pre_hook(note).remove)
        call()
    counts = Counter(each.layer for each in calls)
    found: list[list[PackedLinear]] = []
    for (_, version), run in itertools.groupby(calls, key=lambda each: (id(each.x), each.version)):
        alike: dict[Hashable, list[PackedLinear]] = {}
        for each in run:
            if version is not None and each.way is not None and counts[each.layer] == 1:
                alike.setdefault(each.way, []).append(each.layer)
        found += [layers for layers in alike.values() if len(layers) > 1]
    return found


def _way(layer: PackedLinear, x: torch.Tensor) -> Hashable:
    settings = layer.settings.activation
    plain = type(layer) in (PackedLinear, PackedConv1D) and "forward" not in vars(layer)
    # A static range is each layer's own.
    if not plain or settings is None or settings.range == "static" or not layer.takes_integers(x):
        return None
    bias = None if layer.bias is None else layer.bias.dtype
    return settings, layer.settings.weight.bits, layer.weight_scale.shape[1], bias


def _same(call: Callable[[], Outputs], before: Outputs) -> bool:
    try:
        return all(map(torch.equal, call(), before))
    except Exception:  # noqa: BLE001 - of a model of any kind, as one that needs its layers' outputs to be contiguous
        return False
