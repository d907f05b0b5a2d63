"""Parameter groups by name: an optimizer's state is saved by position, which an operation changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError

GroupNames = list[list[str | None]]
"""The names of one optimizer's parameters, group by group; ``None`` for a parameter of some other module."""

_PER_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs")
"""Lists of torch's learning-rate schedules that have one entry for each parameter group."""


def group_names(optimizer: Optimizer, module: nn.Module) -> GroupNames:
    """Return the names that the optimizer's parameters have in ``module``."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def restore_groups(optimizer: Optimizer, module: nn.Module, names: GroupNames, schedules: Iterable[Any] = ()) -> None:
    """Give the parameter groups of a new optimizer the members, the order and the number that ``names`` says.

    Afterwards the saved state fits by position. A group whose parameters are all gone is put back, empty. Functions
    inside a schedule are the new ones, because no checkpoint holds them; an empty group gets any of them.

    Args:
        optimizer: just configured for ``module``, its state not yet loaded; edited in place.
        module: the module, already in the structure of the checkpoint.
        names: what :func:`group_names` gave when the checkpoint was saved.
        schedules: learning-rate schedules; those of this optimizer get an entry for each group that is put back.

    Raises:
        FiftyfoldError: if the optimizer was configured in another way than the one that was saved.
    """
    places = _match(group_names(optimizer, module), names)
    parameters: dict[str | None, nn.Parameter] = dict(module.named_parameters())
    missing = next((name for name in _flat(names) if name is not None and name not in parameters), None)
    if missing is not None:
        raise FiftyfoldError(f"the checkpoint's optimizer trains {missing!r}, which the model does not have.")
    strangers = iter(_strangers(optimizer, parameters.values(), sum(name is None for name in _flat(names))))
    old = list(optimizer.param_groups)
    groups = [{**optimizer.defaults, "params": []} if place is None else old[place] for place in places]
    for group, members in zip(groups, names, strict=True):
        group["params"] = [next(strangers) if name is None else parameters[name] for name in members]
    optimizer.param_groups[:] = groups
    if None in places:
        for schedule in schedules:
            _extend_schedule(schedule, optimizer, places, len(old))


def _match(fresh: GroupNames, saved: GroupNames) -> list[int | None]:
    """For each saved group, the place of the fresh one that it continues; ``None`` if all its parameters are gone."""
    if len(fresh) == len(saved):
        return list(range(len(saved)))
    home = {name: place for place, names in enumerate(fresh) for name in names if name is not None}
    places = [next((home[name] for name in names if name in home), None) for names in saved]
    if sorted(place for place in places if place is not None) != list(range(len(fresh))):
        raise FiftyfoldError(
            f"the optimizer has {len(fresh)} parameter groups, the checkpoint's {len(saved)}, and their parameters "
            "do not match; configure the optimizer as in the run that saved the checkpoint."
        )
    return places


def _strangers(optimizer: Optimizer, own: Iterable[nn.Parameter], expected: int) -> list[nn.Parameter]:
    """The parameters of other modules; where none were saved, they are ones that the module has lost since."""
    known = {id(parameter) for parameter in own}
    found = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    if expected not in (0, len(found)):
        raise FiftyfoldError(
            f"the optimizer trains {len(found)} parameters from outside the model and the checkpoint's trained "
            f"{expected}; configure the optimizer as in the run that saved the checkpoint."
        )
    return found if expected else []


def _extend_schedule(schedule: Any, optimizer: Optimizer, places: Sequence[int | None], count: int) -> None:
    for inner in getattr(schedule, "_schedulers", ()):
        _extend_schedule(inner, optimizer, places, count)
    if getattr(schedule, "optimizer", None) is not optimizer:
        return
    for key in _PER_GROUP:
        values = getattr(schedule, key, None)
        if isinstance(values, list) and len(values) == count:
            setattr(schedule, key, [values[place or 0] for place in places])


def _flat(names: GroupNames) -> Iterator[str | None]:
    for group in names:
        yield from group
