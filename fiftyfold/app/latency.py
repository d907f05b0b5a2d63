"""Latency of models side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ROUNDS = 30
WARM_UP_ROUNDS = 2
LARGEST_BATCH = 32
LONGEST_SECONDS = 30.0


@torch.inference_mode()
def measure_latency(models: Mapping[str, nn.Module], batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Time the forward passes of several models in turn, so that a slow moment of the machine meets all of them.

    Each is timed in up to 30 rounds after a warm-up, in fewer if those would take longer than half a minute. A round
    calls each model twice and times the second call, as of a model that is called again and again: the first pays for
    what the others have left behind, cold caches and threads that still spin.

    Args:
        models: transformers models by name, on one device; put into eval mode.
        batch: what each of them is called with: its first 32 rows, labels left out.

    Returns:
        The median per model, in milliseconds a batch.
    """
    inputs = {name: tensor[:LARGEST_BATCH] for name, tensor in batch.items() if name != "labels"}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    for _ in range(WARM_UP_ROUNDS):
        for model in models.values():
            _time_once(model, inputs)
    end = time.perf_counter() + LONGEST_SECONDS
    for done in range(ROUNDS):
        if done and time.perf_counter() > end:
            break
        for name, model in models.items():
            _time_once(model, inputs)
            times[name].append(_time_once(model, inputs))
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
