"""Changing modules while they train: tied weights stay tied, and optimizers keep what still holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """Return a module's name without the parts that compiling, sharding and checkpointing of activations add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameter_map(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, a tied one under its first name only."""
    return dict(model.named_parameters())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands below ``model``, under every alias."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def leave_fused_paths(model: nn.Module, replaced: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
    """Keep torch's encoder layers from computing with the ``weight`` of layers inside them that is no dense weight.

    In evaluation, ``nn.TransformerEncoderLayer`` hands the weights of its linear layers to one fused operation and
    never calls the layers; without the mark for a known activation function it calls them.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and any(isinstance(m, replaced) for m in layer.modules()):
            layer.activation_relu_or_gelu = 0


def update_optimizer(optimizer: Optimizer, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> None:
    """Edit ``optimizer`` in place after a model's parameters changed.

    Parameters that the model lost leave their group, and their state goes with them. A new parameter enters the group,
    and the place, of the lost parameter whose name has the longest beginning in common with its own. Parameters that
    never belonged to the model stay where they are. Learning-rate schedules go on undisturbed, because the groups stay
    the same objects.

    Args:
        optimizer: any torch optimizer.
        before: the model's parameters by name before the change.
        after: the same afterwards.
    """
    kept = {id(parameter) for parameter in after.values()}
    lost = {id(parameter): name for name, parameter in before.items() if id(parameter) not in kept}
    old = {id(parameter) for parameter in before.values()}
    heirs = _heirs(lost.values(), [(name, p) for name, p in after.items() if id(p) not in old])
    for group in optimizer.param_groups:
        parameters: list[nn.Parameter] = []
        for parameter in group["params"]:
            if id(parameter) in lost:
                parameters.extend(heirs.pop(lost[id(parameter)], []))
                optimizer.state.pop(parameter, None)
            else:
                parameters.append(parameter)
        group["params"] = parameters


def parameter_checksum(model: nn.Module) -> torch.Tensor:
    """Return two float64 numbers that differ between ranks whose parameters differ.

    The first is the sum of all parameters, the second the same weighted by position, so that a swap shows too. Of
    parameters that are distributed over the ranks as ``DTensor`` none counts, because no rank holds them whole.
    """
    parameters = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    return tensor_checksum(parameters, next(iter(model.parameters())).device)


def tensor_checksum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the sum of ``tensors``, and the same weighted by position; two float64 numbers on ``device``."""
    checksum = torch.zeros(2, dtype=torch.float64, device=device)
    for position, parameter in enumerate(tensors, start=1):
        total = parameter.detach().sum(dtype=torch.float64).to(device)
        checksum += torch.stack([total, total * position])
    return checksum


def _heirs(lost: Iterable[str], new: list[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    names = list(lost)
    heirs: dict[str, list[nn.Parameter]] = {}
    for name, parameter in new:
        if names:
            nearest = max(names, key=lambda candidate: _common_parts(candidate, name))
            heirs.setdefault(nearest, []).append(parameter)
    return heirs


def _common_parts(first: str, second: str) -> int:
    count = 0
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count
