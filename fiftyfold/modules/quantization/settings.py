"""How a layer is quantized: plain values that are checked once and travel as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, get_args

from fiftyfold.errors import FiftyfoldError

Granularity = Literal["per_tensor", "per_channel", "per_group"]
ActivationRange = Literal["dynamic", "static"]

WEIGHT_BITS = (1, 2, 3, 4, 8)
ACTIVATION_BITS = (4, 8, 16)

_Settings = TypeVar("_Settings", "WeightSettings", "ActivationSettings")


@dataclass(frozen=True)
class WeightSettings:
    """How the weight of a layer is quantized.

    Attributes:
        bits: 1 (binary), 2 (ternary), 3, 4 or 8 (uniform).
        granularity: which entries share a scale: the whole weight, an output channel (the row of an embedding), or
            ``group_size`` neighbours along the input dimension of an output channel.
        group_size: entries in a group; only for ``"per_group"``.
        clip: weights are clamped to ``[-clip, clip]`` before they are quantized, and get no gradient outside
            (TernaryBERT uses 2.5). ``None``: every weight gets its gradient unchanged (XTC).
    """

    bits: int = 1
    granularity: Granularity = "per_tensor"
    group_size: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_choice("weight_bits", self.bits, WEIGHT_BITS)
        _check_choice("granularity", self.granularity, get_args(Granularity))
        _check_clip(self.clip)
        if self.granularity == "per_group":
            if not _is_integer(self.group_size) or self.group_size is None or self.group_size < 1:
                raise FiftyfoldError(
                    f"granularity 'per_group' needs group_size, an integer of at least 1, not {self.group_size!r}."
                )
        elif self.group_size is not None:
            raise FiftyfoldError(f"group_size belongs to granularity 'per_group', not to {self.granularity!r}.")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WeightSettings:
        """Read what :meth:`to_json` wrote.

        Raises:
            FiftyfoldError: if a value is unknown or impossible.
        """
        return _from_json(cls, values)


@dataclass(frozen=True)
class ActivationSettings:
    """How the input of a layer is quantized.

    Attributes:
        bits: 4, 8 or 16. Integer products take 16 bits in two passes of 8, and so twice the time.
        symmetric: whether zero is in the middle of the grid; otherwise the grid runs from the lowest to the highest
            value.
        range: ``"dynamic"`` gives each token its own range, measured as it passes; ``"static"`` gives the whole input
            one range, observed while training.
        full_range: use all ``2**bits`` codes, as XTC does, so that the highest value falls outside the grid by one
            code; otherwise the grid ends at the highest value exactly.
        clip: inputs are clamped to ``[-clip, clip]`` before they are quantized, and get no gradient outside.
    """

    bits: int = 8
    symmetric: bool = True
    range: ActivationRange = "dynamic"
    full_range: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_choice("activation_bits", self.bits, ACTIVATION_BITS)
        _check_choice("activation_range", self.range, get_args(ActivationRange))
        _check_flag("symmetric", self.symmetric)
        _check_flag("full_range", self.full_range)
        if self.full_range and self.bits == 16:
            raise FiftyfoldError("activations of 16 bits have no full range; leave full_range out.")
        _check_clip(self.clip)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ActivationSettings:
        """Read what :meth:`to_json` wrote.

        Raises:
            FiftyfoldError: if a value is unknown or impossible.
        """
        return _from_json(cls, values)


@dataclass(frozen=True)
class LayerSettings:
    """How a layer is quantized; ``activation=None`` leaves its input as it is."""

    weight: WeightSettings
    activation: ActivationSettings | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            "weight": self.weight.to_json(),
            "activation": None if self.activation is None else self.activation.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerSettings:
        """Read what :meth:`to_json` wrote.

        Raises:
            FiftyfoldError: if a value is unknown or impossible.
        """
        if not isinstance(values, Mapping) or set(values) != {"weight", "activation"}:
            raise FiftyfoldError("settings of a quantized layer must have exactly the entries 'weight', 'activation'.")
        activation = values["activation"]
        return cls(
            WeightSettings.from_json(values["weight"]),
            None if activation is None else ActivationSettings.from_json(activation),
        )


def _from_json(cls: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    if not isinstance(values, Mapping):
        raise FiftyfoldError(f"{cls.__name__} must be an object, not {str(values)[:80]}.")
    known = {field.name for field in fields(cls)}
    if unknown := sorted(str(name) for name in values if name not in known):
        raise FiftyfoldError(f"{cls.__name__} has no entry {unknown[0]!r}; known: {', '.join(sorted(known))}.")
    return cls(**values)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # Comparing types as well keeps True and 1.0 out, which equal 1 but are written differently into a log.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise FiftyfoldError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}.")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise FiftyfoldError(f"{name} must be true or false, not {value!r}.")


def _check_clip(clip: object) -> None:
    if clip is None:
        return
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not (0 < clip < math.inf):
        raise FiftyfoldError(f"clip must be a positive number or none, not {clip!r}.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
