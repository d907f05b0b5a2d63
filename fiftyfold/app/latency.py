"""Latency of models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ROUNDS = 30
WARM_UP_ROUNDS = 3


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor], rounds: int = ROUNDS
) -> dict[str, float]:
    """Time the forward passes of several models in turn, so that a slow moment of the machine meets all of them.

    Args:
        models: transformers models by name, on one device; put into eval mode.
        batch: what each of them is called with, labels left out.
        rounds: how often each is timed, after a warm-up.

    Returns:
        The median per model, in milliseconds a batch.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    for current in range(WARM_UP_ROUNDS + rounds):
        for name, model in models.items():
            seconds = _time_once(model, inputs)
            if current >= WARM_UP_ROUNDS:
                times[name].append(seconds)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def _time_once(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    _synchronize()
    begin = time.perf_counter()
    model(**inputs)
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
