"""Running a stack of layers only from where its weights last changed.

A compression that goes from layer to layer needs the inputs of each in turn. Running the model from its beginning for
each of n layers costs n² layers; keeping the output of the last one that is done with costs n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack


class FinishedLayers:
    """What the last layer that is done with gives out, for each of several batches.

    The model's own forward pass still leads from layer to layer; those that are done with give the known output instead
    of computing. So nothing need be known of what a model does between its layers.

    Args:
        layers: called one after another in each forward pass, once each; none, where all is to be run each time.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self._layers = list(layers)
        self._holders: dict[int, int] = {}
        for index, layer in enumerate(layers):
            for inner in layer.modules():
                self._holders.setdefault(id(inner), index)
        self._known: dict[int, tuple[int, Any]] = {}

    @contextmanager
    def running(self, parts: Sequence[nn.Module], batch: int) -> Iterator[None]:
        """Let calls of the model with a batch run only the layers from the one that holds some parts on.

        No layer before that one may change any more.

        Args:
            parts: modules inside one layer; for others, the whole model runs.
            batch: its number.
        """
        holders = {self._holders.get(id(part), 0) for part in parts}
        last = min(holders, default=0) - 1
        reached, output = self._known.get(batch, (-1, None))
        with ExitStack() as changes:
            if reached <= last:
                for layer in self._layers[: reached + 1]:
                    layer.forward = functools.partial(_give, output)
                    changes.callback(delattr, layer, "forward")
            if reached < last:
                keep = functools.partial(self._keep, batch, last)
                changes.callback(self._layers[last].register_forward_hook(keep).remove)
            yield

    def _keep(self, batch: int, index: int, _: nn.Module, __: Any, output: Any) -> None:
        self._known[batch] = index, _copied(output)


def finished_layers(model: nn.Module, run: Callable[[], torch.Tensor]) -> FinishedLayers:
    """Return the keeper of a model's stack of layers, if it has one whose layers only read what the one before gave.

    That is tried at each layer: the model's output may not change by a bit.

    Args:
        model: in evaluation mode.
        run: calls it with a batch and returns its output.
    """
    layers = _stack(model)
    keeper, before = FinishedLayers(layers), run()
    for layer in layers[1:]:
        for _ in range(2):  # the first run keeps, the second gives
            with keeper.running([layer], 0):
                after = run()
        if not torch.equal(before, after):
            return FinishedLayers()
    return FinishedLayers(layers)


def same_layers(keeper: FinishedLayers, model: nn.Module) -> FinishedLayers:
    """Return a keeper for a copy of the model that another was found for."""
    return FinishedLayers(_stack(model) if keeper._layers else ())


def _stack(model: nn.Module) -> list[nn.Module]:
    try:
        layers = list(layer_stack(model, find_layer_stack(model)))
    except FiftyfoldError:
        return []
    return [] if any("forward" in vars(layer) for layer in layers) else layers


def _give(output: Any, *_: Any, **__: Any) -> Any:
    return _copied(output)


def _copied(output: Any) -> Any:
    """Return the same with tensors of its own, for what comes after may write into them."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, output)
