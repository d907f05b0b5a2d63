"""The structure log: which operations made a model what it is.

A compression is an *operation*: a JSON object such as
``{"op": "reduce_layers", "layers": [1, 3, 5], ...}``. The module that it changed carries the ordered list of its
operations. The list travels in the state dict of that module, under one key, and is replayed on a fresh module before
its weights load; so a checkpoint resumes into the architecture that it was taken from.

The hooks are plain functions that read the module they are handed: a deep copy or a pickle carries its own log.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.surgery import named_parameter_map, plain_name, update_optimizer

Operation = dict[str, Any]
"""One entry of a structure log: JSON values only, with its kind under ``"op"``."""

STATE_KEY = "fiftyfold_structure"
"""Name of the log's tensor in a state dict, relative to the module that carries the log."""

_LOG_ATTRIBUTE = "_fiftyfold_structure"
_LISTENS_ATTRIBUTE = "_fiftyfold_listens"
_REWINDS_ATTRIBUTE = "_fiftyfold_rewinds"
_FORMAT_VERSION = 1
_LARGEST_LOG_BYTES = 16 * 2**20

Replay = Callable[[nn.Module, Operation], None]
_REPLAYS: dict[str, Replay] = {}
_VALUES_FOLLOW = contextvars.ContextVar("values_follow", default=False)
_UNDOS: dict[str, Replay] = {}
_FORBIDDEN_AFTER: dict[str, frozenset[str]] = {}


def register_operation(
    name: str, replay: Replay, *, forbidden_after: Iterable[str] = (), undo: Replay | None = None
) -> None:
    """Teach the log one kind of operation.

    Args:
        name: the value of ``"op"``.
        replay: changes a module in place as the operation says. It must take every choice from the operation and
            decide nothing anew, and it must work on the meta device.
        forbidden_after: kinds of operation that must not stand before this one in a log.
        undo: takes the operation back, if it is the last one; for kinds that leave all parameters as they are.
    """
    if undo is not None:
        _UNDOS[name] = undo
    _REPLAYS[name] = replay
    _FORBIDDEN_AFTER[name] = frozenset(forbidden_after)


def keeps_parameters(name: str) -> bool:
    """Tell whether operations of this kind leave all parameters as they are."""
    return name in _UNDOS


def structure_log(model: nn.Module) -> list[Operation]:
    """Return a copy of the operations that ``model`` carries, oldest first; empty if there are none."""
    return json.loads(json.dumps(getattr(model, _LOG_ATTRIBUTE, [])))  # type: ignore[no-any-return]


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights without the log, for a folder of transformers, which knows nothing of it."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] != STATE_KEY}


def attach_structure(model: nn.Module) -> None:
    """Make ``model`` carry a log in its state dict. Doing it again changes nothing."""
    if not has_structure(model):
        setattr(model, _LOG_ATTRIBUTE, [])
        model.register_state_dict_post_hook(_write_log)
        listen(model)


def listen(module: nn.Module) -> None:
    """Let ``module`` replay the logs that it finds in a state dict, its own and those of its submodules.

    Unlike :func:`attach_structure` this adds nothing to the state dict. Doing it again changes nothing.
    """
    if not getattr(module, _LISTENS_ATTRIBUTE, False):
        setattr(module, _LISTENS_ATTRIBUTE, True)
        module.register_load_state_dict_pre_hook(_load_structure)


def let_rewind(module: nn.Module, allowed: bool) -> None:
    """Let ``module`` go back to an earlier structure when an earlier checkpoint is loaded, where that can be undone."""
    for part in (module, compression_root(module)):
        setattr(part, _REWINDS_ATTRIBUTE, allowed)


def has_structure(model: nn.Module) -> bool:
    """Tell whether ``model`` itself carries a log (an empty one counts)."""
    return hasattr(model, _LOG_ATTRIBUTE)


def compression_root(module: nn.Module) -> nn.Module:
    """Find the part of ``module`` that carries, or is to carry, the log.

    That is the one part that carries a log already; else the one topmost transformers model that has something to
    train, so that its names are those of the exported folder; else ``module`` itself.
    """
    carriers = [child for child in module.modules() if has_structure(child)]
    if len(carriers) == 1:
        return carriers[0]
    models = list(dict.fromkeys(_topmost_transformers(module)))
    trained = [model for model in models if any(parameter.requires_grad for parameter in model.parameters())]
    return trained[0] if len(trained) == 1 else module


def logs_by_part(module: nn.Module) -> dict[str, list[Operation]]:
    """Return the log of each part of ``module`` that carries one, by the part's plain name."""
    return {plain_name(name): structure_log(part) for name, part in module.named_modules() if has_structure(part)}


def check_order(log: Iterable[Operation], names: Iterable[str]) -> None:
    """Refuse an order of operations that makes no sense.

    Args:
        log: operations already done.
        names: kinds of operation that are to follow, in their order.

    Raises:
        FiftyfoldError: if one of them must not come after another.
    """
    done = [str(operation["op"]) for operation in log]
    for name in names:
        clash = next((earlier for earlier in done if earlier in _FORBIDDEN_AFTER.get(name, ())), None)
        if clash is not None:
            raise FiftyfoldError(f"{name!r} cannot follow {clash!r} on the same model; schedule {name!r} first.")
        done.append(name)


def apply_operation(model: nn.Module, operation: Operation, optimizers: Iterable[Optimizer] = ()) -> None:
    """Carry out one operation on ``model`` in place, mend the optimizers, and record it.

    Args:
        model: the module that carries the log; names inside the operation are relative to it.
        operation: JSON values only.
        optimizers: optimizers that hold parameters of ``model``; edited in place.

    Raises:
        FiftyfoldError: if the operation is unknown, out of order, or impossible on this model.
    """
    check_order(structure_log(model), [str(operation["op"])])
    trainers = list(optimizers)
    for optimizer in trainers:
        if not hasattr(optimizer, "param_groups"):
            raise FiftyfoldError(f"{optimizer!r} is no optimizer; give the one that trains the model, or none.")
    before = named_parameter_map(model)
    _carry_out(model, operation)
    for optimizer in trainers:
        update_optimizer(optimizer, before, named_parameter_map(model))
    attach_structure(model)
    getattr(model, _LOG_ATTRIBUTE).append(json.loads(json.dumps(operation)))


def replay(model: nn.Module, log: Iterable[Operation]) -> None:
    """Carry out and record the operations of ``log`` that ``model`` has not had yet.

    Raises:
        FiftyfoldError: if the model's own log is not the beginning of ``log``.
    """
    wanted = list(log)
    _rewind(model, wanted)
    have = structure_log(model)
    if wanted[: len(have)] != have:
        raise FiftyfoldError(
            f"the model was changed in another way ({_describe(have)}) than the checkpoint ({_describe(wanted)}); "
            "load the checkpoint into a model built as it was when its training began."
        )
    for operation in wanted[len(have) :]:
        apply_operation(model, operation)


def adopt_log(model: nn.Module, log: Iterable[Operation]) -> None:
    """Give ``model`` a log without carrying it out, for a model that already has the structure."""
    attach_structure(model)
    setattr(model, _LOG_ATTRIBUTE, json.loads(json.dumps(list(log))))


@contextlib.contextmanager
def loading_values() -> Iterator[None]:
    """Say that whatever is replayed inside the block gets its values from a file afterwards.

    An operation that would compute new values from old ones, such as a decomposition, then need not.
    """
    token = _VALUES_FOLLOW.set(True)
    try:
        yield
    finally:
        _VALUES_FOLLOW.reset(token)


def values_follow() -> bool:
    """Tell whether the values of what is replayed now are loaded afterwards."""
    return _VALUES_FOLLOW.get()


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Let every module that loads a state dict inside the block replay the logs found in it.

    ``LightningModule.load_from_checkpoint`` involves no callback, so a class that knows nothing of fiftyfold loads a
    compressed checkpoint only inside this block.
    """
    original = nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        listen(module)
        return original(module, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def encode_log(log: Iterable[Operation]) -> torch.Tensor:
    """Return the log as a one-dimensional uint8 tensor of JSON."""
    text = json.dumps({"version": _FORMAT_VERSION, "operations": list(log)}, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode_log(tensor: torch.Tensor) -> list[Operation]:
    """Read what :func:`encode_log` wrote.

    Raises:
        FiftyfoldError: if the tensor is not a log, or is one of a newer version.
    """
    # Lightning loads some checkpoints lazily, and its placeholders for tensors have few of a tensor's methods.
    tensor = torch.clone(tensor)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _LARGEST_LOG_BYTES:
        raise FiftyfoldError("the checkpoint's structure log is not a list of bytes; the checkpoint is corrupt.")
    try:
        content = json.loads(tensor.cpu().numpy().tobytes())
        version, operations = content["version"], content["operations"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FiftyfoldError("the checkpoint's structure log cannot be read; the checkpoint is corrupt.") from error
    if version != _FORMAT_VERSION:
        raise FiftyfoldError(f"the structure log has version {version!r}; this fiftyfold reads {_FORMAT_VERSION}.")
    return check_log(operations)


def check_log(operations: object) -> list[Operation]:
    """Return ``operations`` if it has a log's form.

    Raises:
        FiftyfoldError: if it is not a list of known operations.
    """
    if not isinstance(operations, list):
        raise FiftyfoldError("the structure log is not a list of operations; the file is corrupt.")
    for operation in operations:
        if not isinstance(operation, dict) or str(operation.get("op")) not in _REPLAYS:
            raise FiftyfoldError(f"the structure log holds an unknown operation: {str(operation)[:80]}.")
    return operations


def _carry_out(model: nn.Module, operation: Operation) -> None:
    name = operation.get("op")
    if name not in _REPLAYS:
        raise FiftyfoldError(f"unknown operation {name!r}; known: {', '.join(sorted(_REPLAYS))}.")
    _REPLAYS[name](model, operation)


def _topmost_transformers(module: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _topmost_transformers(child)


def _describe(log: list[Operation]) -> str:
    return " → ".join(str(operation["op"]) for operation in log) or "not at all"


def _write_log(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _: object) -> None:
    state_dict[prefix + STATE_KEY] = encode_log(getattr(module, _LOG_ATTRIBUTE))


def _load_structure(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_args: object) -> None:
    for key in state_dict:
        if key.startswith(prefix) and key.rpartition(".")[2] == STATE_KEY:
            _attach_part(module, key.removeprefix(prefix).removesuffix(STATE_KEY).rstrip("."))
    written = state_dict.pop(prefix + STATE_KEY, None)
    if written is not None:
        with loading_values():
            replay(module, decode_log(written))
        return
    _rewind(module, [])
    if log := structure_log(module):
        raise FiftyfoldError(
            f"the state dict has no structure log, but the model was already changed ({_describe(log)}); "
            "load it into a fresh model, built as it was before anything compressed it."
        )


def _rewind(model: nn.Module, wanted: list[Operation]) -> None:
    """Take back what ``model`` has had beyond the log ``wanted``, if it may and if all of that can be undone."""
    log: list[Operation] = getattr(model, _LOG_ATTRIBUTE, [])
    common = next((at for at, (one, other) in enumerate(zip(log, wanted, strict=False)) if one != other), None)
    common = min(len(log), len(wanted)) if common is None else common
    beyond = log[common:]
    if not beyond or not getattr(model, _REWINDS_ATTRIBUTE, False):
        return
    if all(operation["op"] in _UNDOS for operation in beyond):
        warnings.warn(
            f"the checkpoint was saved before {_describe(beyond)}; the model goes back to what it was then.",
            stacklevel=2,
        )
        while len(log) > common:
            operation = log.pop()
            _UNDOS[operation["op"]](model, operation)


def _attach_part(module: nn.Module, path: str) -> None:
    """Let one part of ``module`` carry a log, before the state dict reaches it."""
    try:
        attach_structure(module.get_submodule(path))
    except AttributeError as error:
        raise FiftyfoldError(
            f"the checkpoint is that of a model whose part {path!r} was compressed; "
            f"{type(module).__name__} has no such part."
        ) from error
