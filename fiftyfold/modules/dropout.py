"""How much of a student's activations training drops at random."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from fiftyfold.errors import FiftyfoldError


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Give every dropout of a model one probability, in place; its configuration says the same afterwards.

    A student of few bits rarely fits its teacher too closely, and a teacher in evaluation mode drops nothing: without
    dropout the student sees what it is to match.

    Args:
        model: a transformers model.
        probability: at least 0 and below 1.

    Raises:
        FiftyfoldError: if it is not, or if the model has no dropout that could be set above 0.
    """
    if not 0 <= probability < 1:
        raise FiftyfoldError(f"dropout is a probability, at least 0 and below 1, not {probability}.")
    found = sum(_set_in_module(module, probability) for module in model.modules())
    if probability > 0 and not found:
        raise FiftyfoldError(f"{type(model).__name__} has no dropout; leave dropout out, or set it to 0.")
    for name, value in model.config.to_dict().items():
        if _names_dropout(name) and _is_number(value):
            setattr(model.config, name, probability)


def _set_in_module(module: nn.Module, probability: float) -> int:
    """Return how many probabilities were set: a dropout layer's own, or those that a layer hands to functions."""
    if isinstance(module, _DropoutNd):
        module.p = probability
        return 1
    names = [name for name, value in vars(module).items() if _names_dropout(name) and _is_number(value)]
    for name in names:
        setattr(module, name, probability)
    return len(names)


def _names_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
