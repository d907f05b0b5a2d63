"""What an exported folder says of itself: the structure log, and which weights are packed, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.settings import LayerSettings
from fiftyfold.modules.structure import Operation, check_log

FORMAT_VERSION = 1
"""Version of the folder's format. A reader opens this version and older ones."""

Kind = Literal["linear", "embedding", "conv1d"]
RestDtype = Literal["float16", "float32"]

_KEYS = {"format_version", "structure", "settings", "packed", "tied", "rest_dtype"}


@dataclass(frozen=True)
class PackedEntry:
    """One packed module.

    Attributes:
        kind: the layer that it takes the place of.
        shape: shape of the dense weight, as that layer has it.
        settings: how weight and activations are quantized.
    """

    kind: Kind
    shape: tuple[int, int]
    settings: LayerSettings


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
        packed = {}
        for name, entry in self.packed.items():
            if entry.settings not in settings:
                settings.append(entry.settings)
            index = settings.index(entry.settings)
            packed[name] = {"kind": entry.kind, "shape": list(entry.shape), "settings": index}
        return {
            "format_version": FORMAT_VERSION,
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
    if not isinstance(content, Mapping) or set(content) != {"kind", "shape", "settings"}:
        raise _broken(f"the entry of {name!r} does not have kind, shape and settings")
    kind, shape, index = content["kind"], content["shape"], content["settings"]
    if kind not in get_args(Kind):
        raise _broken(f"{name!r} is of the unknown kind {kind!r}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise _broken(f"{name!r} has the impossible shape {shape!r}")
    if type(index) is not int or not 0 <= index < len(settings):
        raise _broken(f"{name!r} names settings that are not there")
    return PackedEntry(kind, (shape[0], shape[1]), settings[index])


def _read_tied(content: object, packed: Mapping[str, PackedEntry]) -> dict[str, str]:
    if not isinstance(content, Mapping):
        raise _broken("'tied' is no mapping")
    for name, source in content.items():
        taker, owner = packed.get(name), packed.get(source) if isinstance(source, str) else None
        if taker is None or owner is None or source in content or not _can_share(taker, owner):
            raise _broken(f"{name!r} cannot share the tensors of {source!r}")
    return dict(content)


def _can_share(one: PackedEntry, other: PackedEntry) -> bool:
    return one.shape == other.shape and one.settings.weight == other.settings.weight


def _broken(reason: str) -> FiftyfoldError:
    return FiftyfoldError(f"the folder's description of its weights is corrupt: {reason}; export the model again.")
