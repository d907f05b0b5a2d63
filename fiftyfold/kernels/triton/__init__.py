"""The kernels for NVIDIA GPUs, written in Triton, which torch for CUDA brings along."""

from __future__ import annotations

import importlib.util
import logging

import torch

from fiftyfold.kernels.backends import Backend

_OLDEST_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)


def find_backend() -> Backend | None:
    """Return the backend for CUDA, or nothing where plain torch must do: without a new triton, or on an older GPU."""
    if importlib.util.find_spec("triton") is None:
        _log.warning("kernels: plain torch on CUDA, because triton is not installed; install it for packed products.")
        return None
    if importlib.util.find_spec("triton.knobs") is None:
        _log.warning("kernels: plain torch on CUDA, because triton is older than 3.4, which torch 2.8 brings along.")
        return None
    if torch.version.hip is not None or torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        _log.warning("kernels: plain torch on CUDA; packed products need an NVIDIA GPU of compute capability 8.0.")
        return None
    from fiftyfold.kernels.triton.backend import BACKEND

    return BACKEND
