"""Hidden states taken while a transformers model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from fiftyfold.modules.layer_stack import find_layer_stack, layer_stack


@contextlib.contextmanager
def capture_hidden_states(
    model: nn.Module, wanted: Collection[int] | None = None, *, stack: str | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states of one forward pass of ``model`` inside the block.

    Number 0 is what enters the first layer (the embedding output), number i what leaves layer i - 1. That is also what
    transformers returns, but for models that normalise after their last layer (GPT-2, LLaMA), where it returns the last
    one normalised: no copy of an inner layer could be compared with that.

    Args:
        model: any model with a stack of layers.
        wanted: keep only these; by default all.
        stack: the name of the stack below ``model``, where it is known.

    Yields:
        The hidden states by number, each [batch, tokens, hidden]; filled by the forward pass.

    Raises:
        FiftyfoldError: if the model has no stack of layers.
    """
    layers = layer_stack(model, find_layer_stack(model) if stack is None else stack)
    states: dict[int, Tensor] = {}

    def keep(number: int, state: Tensor) -> None:
        if wanted is None or number in wanted:
            states[number] = state

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def leaving(number: int, output: Any) -> None:
        keep(number, output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as handles:
        handles.callback(layers[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
        for number, layer in enumerate(layers, start=1):
            hook = layer.register_forward_hook(lambda _, __, output, number=number: leaving(number, output))
            handles.callback(hook.remove)
        yield states
