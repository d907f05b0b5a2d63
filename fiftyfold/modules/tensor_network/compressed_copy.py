"""A copy of a model whose matrices are compressed, from its first layer on to its last."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fiftyfold.modules.journal import Journal, number
from fiftyfold.modules.quantization.targets import named_layers
from fiftyfold.modules.tensor_network.budget import memory_groups
from fiftyfold.modules.tensor_network.channel_order import ChannelOrders, Judge, permute_channels, sort_channels
from fiftyfold.modules.tensor_network.compressed_matrix import (
    CompressedMatrix,
    Plan,
    compress_matrix,
    first_error,
    restore_matrix,
    stays_dense,
    whole_widths,
)
from fiftyfold.modules.tensor_network.families import has_chain
from fiftyfold.modules.tensor_network.finished_layers import FinishedLayers, finished_layers, same_layers
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Batch, Moments, call_order, collect_moments
from fiftyfold.modules.tensor_network.progress import Report
from fiftyfold.modules.tensor_network.sensitivity import outputs_of

_ORDERS = "order of channels"


def compressed_copy(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    sizes: Mapping[str, float],
    plan: Plan,
    *,
    report: Report,
    journal: Journal,
) -> tuple[nn.Module, dict[str, CompressedMatrix], ChannelOrders]:
    """Compress the matrices of a copy of a model, in the order in which it calls them.

    Args:
        model: in evaluation mode.
        names: of its linear layers.
        batches: calibration text.
        sizes: bytes that each matrix may take.
        plan: what is tried.
        report: is told of each matrix.
        journal: knows the matrices that were compressed before.

    Returns:
        The copy, what became of each matrix, and the order of the channels that were sorted.
    """
    student = copy.deepcopy(model)
    layers = dict(named_layers(student))
    orders = _sorted_channels(student, names, batches, sizes, plan, report=report, journal=journal)
    results: dict[str, CompressedMatrix] = {}
    stages = call_order(model, names, batches[0]) if plan.compressed_prefix else memory_groups(layers, names)
    calls = Counter(itertools.chain.from_iterable(stages))
    finished = _finished(model, student, batches[0]) if plan.compressed_prefix else {}
    for index, stage in enumerate(stages):
        new = [name for name in stage if name not in results]
        source, reference = (student, model) if plan.compressed_prefix and index else (model, None)
        moments: dict[str, Moments] = {}
        # Before the first of them changes, which the others may see where layers are called several times.
        if not all(_key(name) in journal for name in new):
            once = plan.compressed_prefix and all(calls[name] == 1 for name in new)
            last, known = (new[-1], finished) if once else (None, {})
            moments = collect_moments(source, new, batches, reference, last=last, finished=known)
        for name in new:
            if _key(name) in journal:
                results[name] = _restored(layers[name], name, journal)
            else:
                own, order = moments.pop(name), orders.columns.get(name)
                if order is not None:
                    own = own.reordered(order, both=source is model)
                result = results[name] = compress_matrix(layers[name], own, sizes[name], plan)
                journal.add(_key(name), result.to_json(), layers[name].state_dict() if result.is_changed else None)
            report("compressed", len(results), len(names))
    return student, {name: results[name] for name in names}, orders


def _sorted_channels(
    student: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    sizes: Mapping[str, float],
    plan: Plan,
    *,
    report: Report,
    journal: Journal,
) -> ChannelOrders:
    """Sort a model's hidden channels in place, as was found before or as is found now."""
    if not has_chain(plan.families):
        return ChannelOrders()
    layers = dict(named_layers(student))
    if _ORDERS in journal:
        orders = journal.read(_ORDERS, functools.partial(ChannelOrders.from_json, model=student))
        permute_channels(student, orders)
        return orders
    small = [
        name
        for name in names
        if not stays_dense(layers[name], sizes[name]) and not whole_widths(layers[name], sizes[name], plan)
    ]
    judge = _remembering(functools.partial(first_error, sizes, plan), journal)
    orders = sort_channels(student, small, batches, judge, report=report)
    journal.add(_ORDERS, orders.to_json())
    return orders


def _remembering(judge: Judge, journal: Journal) -> Judge:
    """Return the judge of channels' orders that judges nothing twice; it is always asked in the same order."""
    asked = Counter[str]()

    def remembering(name: str, matrix: torch.Tensor, metric: Metric) -> float:
        asked[name] += 1
        return journal.remember(f"error {asked[name]} of {name}", lambda: judge(name, matrix, metric), number)

    return remembering


def _key(name: str) -> str:
    return f"matrix {name}"


def _restored(layer: nn.Module, name: str, journal: Journal) -> CompressedMatrix:
    result = journal.read(_key(name), CompressedMatrix.from_json)
    if result.is_changed:
        values = journal.tensors(_key(name))
        journal.read(_key(name), lambda _: restore_matrix(layer, result, values))
    return result


def _finished(model: nn.Module, student: nn.Module, batch: Batch) -> dict[nn.Module, FinishedLayers]:
    found = finished_layers(model, lambda: outputs_of(model, batch).values)
    return {model: found, student: same_layers(found, student)}
