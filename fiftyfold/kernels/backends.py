"""Where the operators' fast implementations come from: one backend for each type of device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fiftyfold.errors import FiftyfoldError

LIBRARY = torch.library.Library("fiftyfold", "FRAGMENT")
"""Holds the operators and what implements them; what it registered lasts as long as it does."""

PACKED_BITS = (1, 2)
"""Bits of the weights that have packed arrangements."""


@dataclass(frozen=True)
class Backend:
    """What a type of device computes packed layers with.

    Attributes:
        arrange: from codes (outputs, inputs), int8, their bits, and into how many groups of scales the inputs are cut,
            to the bytes that ``linear`` reads: uint8, one-dimensional, on the codes' device.
        linear: implements the operator ``fiftyfold::packed_linear`` for weights that ``arrange`` returned, and no
            others. ``None`` where the operator is implemented without Python.
        embedding: implements ``fiftyfold::packed_embedding``; without one, torch's own operations do.
    """

    arrange: Callable[[torch.Tensor, int, int], torch.Tensor]
    linear: Callable[..., torch.Tensor] | None = None
    embedding: Callable[..., torch.Tensor] | None = None


_backends: dict[str, Callable[[], Backend | None]] = {}
_found: dict[str, Backend | None] = {}

# Two threads that serve requests may both bring the first: what implements an operator is registered once.
_finding = threading.RLock()


def register_backend(device_type: str, find: Callable[[], Backend | None]) -> None:
    """Name what computes on a type of device, in place of what was named for it before and not used yet.

    What implements an operator for a device stays as long as the process. After a first use of a backend another one is
    found all the same, and refused if it implements the same operators: by :func:`backend_for`, and so by the layers.

    Args:
        device_type: as in ``torch.device.type``: ``"cpu"``, ``"cuda"``, ….
        find: called once, when a layer on such a device first needs it: compiles or imports what it takes, and returns
            ``None`` if this machine has not got it; plain torch computes then.
    """
    _backends[device_type] = find
    _found.pop(device_type, None)


def backend_for(device_type: str) -> Backend | None:
    """Return the backend of a type of device, or None if plain torch computes there.

    Raises:
        FiftyfoldError: if what was found implements an operator that another backend implements already.
    """
    if device_type not in _found:
        with _finding:
            if device_type not in _found:
                _found[device_type] = _find(device_type)
    return _found[device_type]


def _find(device_type: str) -> Backend | None:
    find = _backends.get(device_type)
    backend = None if find is None else find()
    if backend is not None:
        _implement(device_type, backend)
    return backend


def _implement(device_type: str, backend: Backend) -> None:
    key = device_type.upper()
    for name, function in (("packed_linear", backend.linear), ("packed_embedding", backend.embedding)):
        if function is None:
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fiftyfold::{name}", key):
            raise FiftyfoldError(f"fiftyfold::{name} has an implementation for {device_type} already.")
        LIBRARY.impl(name, function, key)
