"""How much each matrix's error matters to the whole model, measured by changing one matrix at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.journal import Journal, number
from fiftyfold.modules.quantization.targets import named_layers
from fiftyfold.modules.tensor_network.finished_layers import finished_layers
from fiftyfold.modules.tensor_network.layers import matrix_of
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Batch, call, call_stages, collect_moments
from fiftyfold.modules.tensor_network.progress import Report, silent
from fiftyfold.modules.tensor_network.solvers import principal_outputs

_BATCHES = 4
_MOST_LOGITS = 2**26
"""Of a batch: 256 MiB, held twice for a moment; all of 8 x 512 tokens of a vocabulary of 16,000."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch.

    Attributes:
        values: (…, classes or features).
        are_logits: whether they are logits.
    """

    values: torch.Tensor
    are_logits: bool


@torch.no_grad()
def measured_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    curves: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int],
    *,
    report: Report = silent,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Return, for each matrix, the model's deviation over the squared relative error that caused it.

    The layer's outputs are projected onto their leading components, as the best low-rank weight does, with nothing
    else changed; the deviation is the Kullback-Leibler divergence of the logits, or the relative squared change of a
    regression's value or of the first output of a model without logits.

    Args:
        model: in evaluation mode; unchanged afterwards.
        batches: calibration text, of which a few batches are used.
        curves: squared relative error by rank for each matrix.
        ranks: at which the matrix is measured.
        report: is told of each matrix.
        journal: knows what was measured before.

    Raises:
        FiftyfoldError: if no matrix's error makes any difference, or one makes an output that is not finite.
    """
    few = list(batches)[:_BATCHES]
    before = [some_outputs(model, batch) for batch in few]
    finished = finished_layers(model, lambda: outputs_of(model, few[0]).values)
    calls = Counter(itertools.chain.from_iterable(call_stages(model, list(curves), few[0])))
    layers = dict(named_layers(model))
    known = journal or Journal()

    def measured(name: str, curve: torch.Tensor) -> float:
        layer, rank = layers[name], max(1, ranks[name])
        last = name if calls[name] == 1 else None
        moments = collect_moments(model, [name], few, last=last, finished={model: finished})[name]
        directions = principal_outputs(matrix_of(layer).float(), Metric(moments.inputs.float()), rank)
        mean = (matrix_of(layer).double() @ moments.original_mean).float()
        handle = layer.register_forward_hook(_projection(layer, directions, mean))
        deviations = []
        try:
            for index, batch in enumerate(few):
                with finished.running([layer], index):
                    deviations.append(deviation(before[index], some_outputs(model, batch)))
        finally:
            handle.remove()
        found = sum(deviations) / len(deviations) / max(float(curve[min(rank, len(curve) - 1)]), 1e-9)
        if not math.isfinite(found):
            raise FiftyfoldError(
                f"the model's outputs on the calibration text are not finite where {name!r} is approximated; use "
                "allocation='outputs' or 'uniform'."
            )
        return found

    weights = {}
    for name, curve in curves.items():
        weights[name] = known.remember(f"weight of {name}", functools.partial(measured, name, curve), number)
        report("weighed", len(weights), len(curves))
    if not any(weights.values()):
        raise FiftyfoldError(
            "no matrix's error moves the model's first output on the calibration text, so that nothing tells how to "
            "spread the bytes; use allocation='outputs' or 'uniform'."
        )
    return weights


def deviation(before: Outputs, after: Outputs) -> float:
    """Return how far a model's outputs moved: a divergence for logits, else a relative square."""
    first, second = before.values.float(), after.values.float()
    if not before.are_logits:
        return float((first - second).square().sum() / first.square().sum().clamp(min=1e-12))
    logs = [F.log_softmax(each, dim=-1) for each in (first, second)]
    # What a model rules out, by logits of minus infinity, adds nothing.
    terms = F.kl_div(logs[1], logs[0], log_target=True, reduction="none").masked_fill(logs[0].isneginf(), 0)
    return float(terms.sum() / len(terms))


def some_outputs(model: nn.Module, batch: Batch) -> Outputs:
    """Return what a model says of a batch's real tokens, one a row; of tokens at even distances where they are many."""
    outputs = outputs_of(model, batch)
    values = outputs.values
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.to(values.device).bool()]
    rows = values.reshape(-1, values.shape[-1] if values.dim() else 1)
    return Outputs(rows[:: max(1, -(-rows.numel() // _MOST_LOGITS))].clone(), outputs.are_logits)


def outputs_of(model: nn.Module, batch: Batch) -> Outputs:
    """Return what a model says of a batch: its logits, or else the first floating-point tensor of its output."""
    output = call(model, batch)
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        # A single one is a regression's value, of which a softmax would always make one.
        return Outputs(logits, logits.shape[-1] > 1)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return Outputs(leaves[0], False)


def _projection(layer: nn.Module, directions: torch.Tensor, mean: torch.Tensor) -> Any:
    """Return a hook that leaves of a layer's outputs their mean and their leading components."""
    bias = getattr(layer, "bias", None)
    offset = mean if bias is None else mean + bias.float()

    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.float() - offset
        return (moved @ directions @ directions.T + offset).to(output.dtype)

    return hook
