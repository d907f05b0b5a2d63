"""Calibration batches from training code that knows nothing of calibration: what it calls the model with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.surgery import plain_name


class _Called(Exception):  # noqa: N818 - no error: it ends a step that has come as far as it was wanted
    """Ends a training step at the moment when it calls the model."""


@torch.no_grad()
def calls_of(
    module: nn.Module, layers: Sequence[str], steps: Iterable[Callable[[], object]]
) -> tuple[str, list[dict[str, Any]]]:
    """Begin training steps, and return what each calls the part that holds ``layers`` with.

    A step is cut off when that call begins, so that it changes, logs and trains nothing. If parts within each other
    hold all layers, the outermost one that is called counts; a LightningModule is none, for it holds its Trainer.

    Args:
        module: what the steps train, or the part of it that is to be compressed.
        layers: plain names of layers within it.
        steps: each runs the training code on one batch.

    Returns:
        The part's plain name, empty for ``module`` itself, and the arguments of each call by name.

    Raises:
        FiftyfoldError: if a step ends without such a call, or the call's arguments cannot be named.
    """
    holders = dict(_holders(module, layers))
    found: list[dict[str, Any]] = []
    part: str | None = None
    for step in steps:
        with _listening(holders) as calls, contextlib.suppress(_Called):
            step()
        if not calls:
            raise FiftyfoldError(
                f"the training step of {type(module).__name__} calls no module that holds all of the layers, "
                f"{layers[0]!r} and the others; compress it with compress_matrices before the Trainer gets it."
            )
        name, arguments = calls[0]
        if part not in (None, name):
            raise FiftyfoldError(f"the training step calls now {part!r} and now {name!r}; give it one to compress.")
        part = name
        found.append(arguments)
    if part is None:
        raise FiftyfoldError("there is no batch to calibrate on; the training data are empty.")
    return part, found


def _holders(module: nn.Module, layers: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that have all of the layers below them."""
    for name, candidate in module.named_modules(remove_duplicate=False):
        prefix = plain_name(name)
        holds = all(not prefix or layer.startswith(f"{prefix}.") for layer in layers)
        if holds and not isinstance(candidate, LightningModule):
            yield prefix, candidate


@contextlib.contextmanager
def _listening(holders: dict[str, nn.Module]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def note(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, _named(called, args, kwargs)))
            raise _Called

        return note

    with contextlib.ExitStack() as hooks:
        for name, module in holders.items():
            hooks.callback(module.register_forward_pre_hook(hook_of(name), with_kwargs=True).remove)
        yield calls


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and arguments.pop(name, ()):
            raise FiftyfoldError(
                f"{type(module).__name__} is called with arguments that have no names; "
                "compress it with compress_matrices before the Trainer gets it."
            )
    return arguments
