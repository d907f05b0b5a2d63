"""What an export measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.packed.contents import Contents
from fiftyfold.modules.packed.layers import STORED_BUFFERS
from fiftyfold.modules.packed.manifest import PackedEntry, RestDtype
from fiftyfold.modules.packed.skeleton import expected_tensors
from fiftyfold.modules.quantization.bitsandbytes_layers import BitsandbytesLinear
from fiftyfold.modules.quantization.layers import quantized_layers
from fiftyfold.modules.quantization.targets import find_targets

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ExportReport:
    """What an exported folder holds and how it was checked.

    Attributes:
        folder: where it is.
        file_bytes: size of the weight file on disk.
        folder_bytes: size of all files, but for the report itself.
        part_bytes: what the weight file is made of: ``packed_weights``, ``scales`` (and static ranges), ``rest``, and
            ``header`` (names, shapes, checksum).
        parameters: parameters of the model, a tied one counted once, a tensor network as the matrix it stands for.
        packed_parameters: how many of them are packed.
        float32_bytes: what the parameters of this model would take in float32.
        ratio: ``float32_bytes / file_bytes``. It does not count layers that were dropped earlier; for the ratio to a
            teacher, divide the size of its file by ``file_bytes``.
        ideal_ratio: 32 bits over the mean nominal bits of the packed weights, as XTC's paper counts: without scales,
            headers and everything that is not packed. No file reaches it.
        beyond_xtc: packed modules that XTC leaves in float32, such as pooler, position and token-type embeddings;
            nothing if that cannot be told.
        rest_dtype: type of all that is not packed; XTC's count leaves it in float32.
        outputs_equal: whether the reloaded model gave, bit for bit, the outputs of the exported one after its rest was
            rounded to ``rest_dtype``; nothing if there was no example to compute.
        rounding_difference: largest difference between the outputs of the reloaded model and those of the model before
            rounding; nothing if there was no example.
    """

    folder: str
    file_bytes: int
    folder_bytes: int
    part_bytes: dict[str, int]
    parameters: int
    packed_parameters: int
    float32_bytes: int
    ratio: float
    ideal_ratio: float | None
    beyond_xtc: list[str] | None
    rest_dtype: str
    outputs_equal: bool | None
    rounding_difference: float | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, without the folder's place on this machine."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def part_bytes(contents: Contents, file_bytes: int) -> dict[str, int]:
    """Divide the size of a weight file among its parts."""
    sizes = {"packed_weights": 0, "scales": 0, "rest": 0}
    for name, tensor in contents.tensors.items():
        module, _, kind = name.rpartition(".")
        part = "rest"
        if module in contents.manifest.packed and kind != "bias":
            part = "scales" if kind in STORED_BUFFERS else "packed_weights"
        sizes[part] += tensor.nbytes
    return {**sizes, "header": file_bytes - sum(sizes.values())}


def count_parameters(model: nn.Module, contents: Contents) -> tuple[int, int]:
    """Return the parameters of a packed model as if it were dense, and how many of them are packed."""
    manifest = contents.manifest
    packed = sum(
        entry.shape[0] * entry.shape[1] for name, entry in manifest.packed.items() if name not in manifest.tied
    )
    weights = {f"{name}.weight" for name in manifest.packed}
    rest = sum(
        tensor.numel()
        for name, tensor in expected_tensors(model).items()
        if isinstance(tensor, nn.Parameter) and name not in weights
    )
    held = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, BitsandbytesLinear))
    return packed + rest + held, packed + held


def ideal_ratio(contents: Contents) -> float | None:
    """Return 32 over the mean nominal bits of the packed weights; nothing if none is packed."""
    manifest = contents.manifest
    owners = [entry for name, entry in manifest.packed.items() if name not in manifest.tied]
    numbers = sum(entry.shape[0] * entry.shape[1] for entry in owners)
    bits = sum(_nominal_bits(entry, manifest.rest_dtype) for entry in owners)
    return 32 * numbers / bits if bits else None


def _nominal_bits(entry: PackedEntry, rest_dtype: RestDtype) -> int:
    """Return the bits of a weight's own numbers, without scales and pivots."""
    number = getattr(torch, rest_dtype).itemsize * 8 if entry.settings is None else entry.settings.weight.bits
    form = entry.stored_network
    return number * (entry.shape[0] * entry.shape[1] if form is None else form.count)


def beyond_xtc(model: nn.Module) -> list[str] | None:
    """Return the quantized modules that XTC's own configuration leaves in float32; nothing if that cannot be told.

    Args:
        model: before packing.
    """
    try:
        own = set(find_targets(model, "xtc"))
    except FiftyfoldError:
        return None
    return [name for name, _ in quantized_layers(model) if name not in own]


def largest_difference(first: Sequence[torch.Tensor] | None, second: Sequence[torch.Tensor] | None) -> float | None:
    """Return the largest absolute difference between two lists of outputs; nothing if there are none."""
    if first is None or second is None:
        return None
    pairs = zip(first, second, strict=True)
    return max((float((one.double() - other.double()).abs().max()) for one, other in pairs if one.numel()), default=0.0)
