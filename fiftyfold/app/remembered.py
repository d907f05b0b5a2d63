"""What a training checkpoint remembers of the module that it was saved from, read without trusting the file."""

from __future__ import annotations

import collections.abc
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fiftyfold.errors import FiftyfoldError, first_line
from fiftyfold.modules import DistillationModule, FineTuningModule
from fiftyfold.modules.checkpoint import check_checkpoint
from fiftyfold.modules.task_module import DATA_KEY

_MAKEABLE = (Optimizer, LRScheduler, nn.Module)
"""What a checkpoint may ask the command line to make. The class must be imported already: importing runs code."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a checkpoint; its tensors stay on the disk until they are used, and nothing in it is executed.

    Raises:
        FiftyfoldError: if there is none, or if it holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise FiftyfoldError(f"there is no checkpoint at {path}.")
    check_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a torn or forged file makes torch raise anything
        forged = isinstance(error, pickle.UnpicklingError)
        reason = "it asks for more than tensors and plain values" if forged else first_line(error)
        raise FiftyfoldError(f"{path} is not a checkpoint that can be read safely ({reason}).") from error
    if not isinstance(content, dict):
        raise FiftyfoldError(f"{path} is not a checkpoint but holds a {type(content).__name__}.")
    return content


def remembered_model(content: Mapping[str, Any], path: str, typed_class: str | None) -> dict[str, Any] | None:
    """Return the module that a checkpoint remembers, as LightningCLI writes one.

    Args:
        content: what :func:`read_checkpoint` read.
        path: where, for messages.
        typed_class: the class that the user named, a bare name or a full one.

    Returns:
        ``class_path`` and ``init_args``; None if the checkpoint remembers nothing, or another class than is typed.

    Raises:
        FiftyfoldError: if it asks for code that the user did not name.
    """
    arguments = content.get("hyper_parameters")
    if not isinstance(arguments, Mapping) or not arguments:
        return None
    arguments = {str(name): value for name, value in arguments.items() if name not in ("_instantiator", "_class_path")}
    class_path = content["hyper_parameters"].get("_class_path") or _own_class(content, arguments)
    if not isinstance(class_path, str):
        return None
    if typed_class is not None and typed_class.rpartition(".")[2] != class_path.rpartition(".")[2]:
        return None
    module_class = _imported(class_path)
    if not isinstance(module_class, type) or not issubclass(module_class, LightningModule):
        if typed_class == class_path:
            return None
        name = class_path[:200]
        raise FiftyfoldError(
            f"{path} is that of a module {name}, which is not imported; type --model {name} to trust it."
        )
    for name, value in arguments.items():
        _refuse_code(f"{path} sets {name[:80]!r}", value, _may_be_callable(module_class, name))
    return {"class_path": class_path, "init_args": arguments}


def _own_class(content: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """A checkpoint of ``fiftyfold compress`` names no class, since no LightningCLI made its module."""
    if DATA_KEY not in content:
        return None
    kind = DistillationModule if "teacher" in arguments else FineTuningModule
    return f"{kind.__module__}.{kind.__qualname__}"


def _imported(class_path: str) -> object:
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _refuse_code(what: str, value: object, callable_: bool) -> None:
    """Let through plain values, and descriptions of optimizers, schedules and modules that are imported already."""
    if isinstance(value, str) and callable_:
        _check_class(what, value)
    elif isinstance(value, Mapping):
        if "class_path" in value:
            _check_class(what, value["class_path"])
        for each in value.values():
            _refuse_code(what, each, callable_=False)
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_code(what, each, callable_)


def _check_class(what: str, class_path: object) -> None:
    found = _imported(class_path) if isinstance(class_path, str) else None
    if not isinstance(found, type) or not issubclass(found, _MAKEABLE):
        name = str(class_path)[:200]
        raise FiftyfoldError(f"{what} to {name!r}, which a checkpoint may not ask for; type the option.")


def _may_be_callable(module_class: type[LightningModule], name: str) -> bool:
    try:
        hints = get_type_hints(module_class.__init__)
    except (NameError, TypeError):
        return True
    return name in hints and _mentions_callable(hints[name])


def _mentions_callable(annotation: object) -> bool:
    if annotation in (Any, object) or get_origin(annotation) in (collections.abc.Callable, type):
        return True
    return annotation in (collections.abc.Callable, type) or any(map(_mentions_callable, get_args(annotation)))
