"""What an exported folder says of itself: the structure log, and which weights are packed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.settings import LayerSettings
from fiftyfold.modules.structure import Operation, check_log
from fiftyfold.modules.tensor_network.form import NetworkForm

FORMAT_VERSION = 2
"""Version of the folder's format. A reader opens this version and older ones.

2 added tensor networks; a folder without any is still written as version 1.
"""

Kind = Literal["linear", "embedding", "conv1d"]
RestDtype = Literal["float16", "float32"]

_KEYS = {"format_version", "structure", "settings", "packed", "tied", "rest_dtype"}


@dataclass(frozen=True)
class PackedEntry:
    """One packed module.

    Attributes:
        kind: the layer that it takes the place of.
        shape: shape of the dense weight, as that layer has it.
        settings: how weight and activations are quantized; nothing for a network in floating point.
        network: the tensor network that stands for the weight, as it trained. The file keeps a network in floating
            point with its gauge fixed.
    """

    kind: Kind
    shape: tuple[int, int]
    settings: LayerSettings | None
    network: NetworkForm | None = None

    @property
    def stored_network(self) -> NetworkForm | None:
        """The tensor network as the file keeps it."""
        if self.network is None or self.settings is not None:
            return self.network
        return self.network.with_gauge("fixed")

    def can_share(self, other: PackedEntry) -> bool:
        """Tell whether the two may be tied to one weight."""
        weights = [entry.settings and entry.settings.weight for entry in (self, other)]
        return self.shape == other.shape and self.network == other.network and weights[0] == weights[1]


@dataclass(frozen=True)
class Manifest:
    """All that a reader must know before it opens the weights.

    Attributes:
        structure: the structure log of the exported model, oldest operation first.
        packed: packed modules by name.
        tied: packed modules that own no tensor, each with the packed module whose tensors it shares.
        rest_dtype: floating-point type of everything that is not packed.
    """

    structure: list[Operation] = field(default_factory=list)
    packed: dict[str, PackedEntry] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    rest_dtype: RestDtype = "float16"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; settings that modules share are written once."""
        settings: list[LayerSettings] = []
        packed: dict[str, dict[str, Any]] = {}
        for name, entry in self.packed.items():
            packed[name] = {"kind": entry.kind, "shape": list(entry.shape), "settings": _index(entry, settings)}
            if entry.network is not None:
                packed[name]["network"] = entry.network.to_json()
        return {
            "format_version": FORMAT_VERSION if any(entry.network for entry in self.packed.values()) else 1,
            "structure": self.structure,
            "settings": [each.to_json() for each in settings],
            "packed": packed,
            "tied": dict(self.tied),
            "rest_dtype": self.rest_dtype,
        }

    @classmethod
    def from_json(cls, content: object) -> Manifest:
        """Read what :meth:`to_json` wrote, perhaps altered since.

        Raises:
            FiftyfoldError: if the version is newer than this reader, or if anything is missing, unknown or impossible.
        """
        if not isinstance(content, Mapping):
            raise _broken("it is no mapping")
        _check_version(content.get("format_version"))
        if odd := _KEYS.symmetric_difference(content):
            raise _broken(f"{sorted(map(str, odd))[0]!r} is missing or unknown")
        if content["rest_dtype"] not in get_args(RestDtype):
            raise _broken(f"there is no rest_dtype {content['rest_dtype']!r}")
        packed = _read_packed(content["packed"], _read_settings(content["settings"]))
        return cls(check_log(content["structure"]), packed, _read_tied(content["tied"], packed), content["rest_dtype"])


def _index(entry: PackedEntry, settings: list[LayerSettings]) -> int | None:
    """Return the place of an entry's settings in a list, where they are added if need be."""
    if entry.settings is None:
        return None
    if entry.settings not in settings:
        settings.append(entry.settings)
    return settings.index(entry.settings)


def _check_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _broken(f"there is no format version {version!r}")
    if version > FORMAT_VERSION:
        raise FiftyfoldError(
            f"the folder has format version {version}, and this fiftyfold reads up to {FORMAT_VERSION}; "
            "install a newer fiftyfold."
        )


def _read_settings(content: object) -> list[LayerSettings]:
    if not isinstance(content, list):
        raise _broken("'settings' is no list")
    try:
        return [LayerSettings.from_json(each) for each in content]
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(f"one of its settings cannot be read ({error})") from error


def _read_packed(content: object, settings: list[LayerSettings]) -> dict[str, PackedEntry]:
    if not isinstance(content, Mapping):
        raise _broken("'packed' is no mapping")
    return {name: _read_entry(name, entry, settings) for name, entry in content.items()}


def _read_entry(name: str, content: object, settings: list[LayerSettings]) -> PackedEntry:
    if not isinstance(content, Mapping) or set(content) - {"network"} != {"kind", "shape", "settings"}:
        raise _broken(f"the entry of {name!r} does not have kind, shape and settings")
    kind, shape, index = content["kind"], content["shape"], content["settings"]
    if kind not in get_args(Kind):
        raise _broken(f"{name!r} is of the unknown kind {kind!r}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise _broken(f"{name!r} has the impossible shape {shape!r}")
    network = NetworkForm.from_json(content["network"]) if "network" in content else None
    if index is None and network is not None:
        return PackedEntry(kind, (shape[0], shape[1]), None, network)
    if type(index) is not int or not 0 <= index < len(settings):
        raise _broken(f"{name!r} names settings that are not there")
    return PackedEntry(kind, (shape[0], shape[1]), settings[index], network)


def _read_tied(content: object, packed: Mapping[str, PackedEntry]) -> dict[str, str]:
    if not isinstance(content, Mapping):
        raise _broken("'tied' is no mapping")
    for name, source in content.items():
        taker, owner = packed.get(name), packed.get(source) if isinstance(source, str) else None
        if taker is None or owner is None or source in content or not taker.can_share(owner):
            raise _broken(f"{name!r} cannot share the tensors of {source!r}")
    return dict(content)


def _broken(reason: str) -> FiftyfoldError:
    return FiftyfoldError(f"the folder's description of its weights is corrupt: {reason}; export the model again.")
