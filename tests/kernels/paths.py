"""The library under test, on each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fiftyfold.kernels.cpu import CpuLibrary, cpu_status


def library() -> CpuLibrary:
    status = cpu_status()
    if status.library is None:
        pytest.skip(f"there is no library: {status.reason}")
    return status.library


@contextmanager
def path(name: str) -> Iterator[None]:
    found = library()
    before = found.path()
    if name not in found.paths():
        pytest.skip(f"this processor has no {name}")
    found.choose_path(name)
    try:
        yield
    finally:
        found.choose_path(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two results are equal, zeros with their signs, numbers that are none in equal places."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (values.masked_fill(values.isnan(), 0).contiguous().view(whole) for values in (a, b))
    return torch.equal(a, b)
