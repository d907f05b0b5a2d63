"""Digests that tell apart models, texts and options, so that no work goes on that belongs to another one."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.surgery import plain_name

_NO_PART_OF_IT = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say where a model comes from, not what it computes."""


def digest_of(value: Any) -> str:
    """Return a digest over nested mappings in any order, sequences, plain values, arrays and typed tensors.

    Raises:
        FiftyfoldError: if there is anything else in it.
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Return all that decides what a model computes: its tensors, what it is built of, and its configurations.

    A structure log, which a state dict holds besides, is no part of it: it only tells how the model became what it is.
    """
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    configurations = (getattr(module, "config", None) for module in model.modules())
    found = {id(each): each for each in configurations if isinstance(each, PretrainedConfig)}
    return {
        "tensors": {plain_name(name): tensor for name, tensor in named},
        "structure": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "settings": {plain_name(name): _settings(module) for name, module in model.named_modules()},
        "configurations": [_plain(each.to_dict()) for each in found.values()],
    }


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain values that a module keeps, such as a scale."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in plain.items() if name != "training" and not name.startswith("_")}


def _plain(configuration: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in configuration.items() if key not in _NO_PART_OF_IT}
    return json.dumps(kept, sort_keys=True, default=str)


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        if not value.is_meta:
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for name, each in sorted(value.items(), key=lambda item: repr(item[0])):
            yield f"{name!r} ".encode()
            yield from _parts(each)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)} ".encode()
        for each in value:
            yield from _parts(each)
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        yield f"{value!r} ".encode()
    else:
        raise FiftyfoldError(
            f"nothing tells one {type(value).__name__} from another, so that no work folder can belong to it; leave "
            "the work folder or that value out."
        )
