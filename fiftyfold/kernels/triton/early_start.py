"""Kernels that start before the one in front of them has ended, where the GPU can: compute capability 9.0.

What such a kernel does before ``gdc_wait`` may not read what the one in front writes; starting takes most of that time.
"""

from __future__ import annotations

import functools

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["early_options", "gdc_launch_dependents", "gdc_wait", "starts_early"]


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Return whether kernels on a device may start early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early_options(device: torch.device) -> dict[str, bool]:
    """Return what a kernel is launched with that starts early where it can: ``EARLY`` tells it so."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}
