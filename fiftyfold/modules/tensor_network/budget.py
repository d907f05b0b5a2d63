"""How many bytes each matrix may take: one budget, spread by what an error there does to the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from fiftyfold.kernels.packing import packed_bytes
from fiftyfold.modules.journal import Journal, number
from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.quantization.targets import named_layers
from fiftyfold.modules.sizes import SCALE_BYTES
from fiftyfold.modules.tensor_network.allocation import Option, allocate
from fiftyfold.modules.tensor_network.families import largest_rank, low_rank_curve
from fiftyfold.modules.tensor_network.form import low_rank_form
from fiftyfold.modules.tensor_network.layers import matrix_shape
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Batch, Moments, collect_moments
from fiftyfold.modules.tensor_network.objective import least_squares
from fiftyfold.modules.tensor_network.progress import Report, silent
from fiftyfold.modules.tensor_network.sensitivity import measured_sensitivity

Allocation = Literal["model", "outputs", "uniform"]
"""``model``: bytes go where they lower the whole model's deviation, measured one matrix at a time.
``outputs``: where they lower the squared relative errors of the layers' outputs, known from one pass; quicker, and
better for a very small model, which all matrices together move much further than one does.
``uniform``: the same share for all.

The first two give no network less than two thirds or more than one and a half of the common share: training heals an
even loss better than one that a few matrices bear, however little they seem to matter before it.
"""

DENSE_BYTES = 2
"""Of one number of a matrix that stays as it is."""

_SPREAD = 1.5
_STEPS = 6
_LARGEST_MOMENTS = 2 * 2**30


def spread_bytes(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    keep: float,
    allocation: Allocation,
    bits: int,
    whole_bits: Sequence[int] = (),
    report: Report = silent,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Return the bytes that each matrix may take.

    Args:
        model: in evaluation mode.
        names: of its linear layers.
        batches: calibration text.
        keep: share of the bytes that the matrices take in 16 bits.
        allocation: how the bytes are spread.
        bits: of one number of a network.
        whole_bits: in which a matrix may stay whole.
        report: is told of each matrix whose errors are measured, and of each that is weighed by the whole model's.
        journal: knows what was measured before.

    Raises:
        FiftyfoldError: if the budget cannot be met.
    """
    layers = dict(named_layers(model))
    dense = {name: DENSE_BYTES * matrix_shape(layers[name])[0] * matrix_shape(layers[name])[1] for name in names}
    if allocation == "uniform":
        return {name: keep * size for name, size in dense.items()}
    shapes = {name: matrix_shape(layers[name]) for name in names}
    curves: dict[str, torch.Tensor] = {}
    wholes: dict[str, list[Option]] = {}
    rounding: dict[str, float] = {}
    known = journal or Journal()
    for group in memory_groups(layers, names):
        missing = [name for name in group if _key(name) not in known]
        moments = collect_moments(model, missing, batches) if missing else {}
        for name in group:
            find = functools.partial(_errors, layers[name], moments.get(name), bits, whole_bits)
            errors = known.remember(_key(name), find, _read_errors)
            curves[name], rounding[name] = torch.tensor(errors["ranks"], dtype=torch.float64), errors["factors"][0]
            pairs = zip(whole_bits, errors["wholes"], strict=True)
            wholes[name] = [Option(whole_bytes(shapes[name], b), error) for b, error in pairs]
            report("measured", len(curves), len(names))
    weights = dict.fromkeys(names, 1.0)
    if allocation == "model":
        ranks = {name: largest_rank(shapes[name], keep * dense[name], bits) for name in names}
        weights = measured_sensitivity(model, batches, curves, ranks, report=report, journal=known)
    options = [
        [
            *_options(shapes[name], (curves[name] + rounding[name]) * weights[name], dense[name], keep, bits),
            *(Option(each.bytes, each.cost * weights[name]) for each in wholes[name]),
        ]
        for name in names
    ]
    chosen = allocate(options, keep * sum(dense.values()))
    return {name: each[index].bytes for name, each, index in zip(names, options, chosen, strict=True)}


def _key(name: str) -> str:
    return f"errors of {name}"


def _errors(layer: nn.Module, moments: Moments | None, bits: int, whole_bits: Sequence[int]) -> dict[str, list[float]]:
    """Return squared relative errors: of each rank, of a whole matrix in few bits, and of rounding factors."""
    assert moments is not None
    target, metric = least_squares(layer, moments)
    # Factors have an error of their own where they are quantized, however large their rank.
    factors = rounding_error(target, metric, bits) if bits < 16 and whole_bits else 0.0
    return {
        "ranks": low_rank_curve(target, metric).tolist(),
        "wholes": [rounding_error(target, metric, each) for each in whole_bits],
        "factors": [factors],
    }


def _read_errors(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {kind: [number(error) for error in values[kind]] for kind in ("ranks", "wholes", "factors")}


def _options(shape: tuple[int, int], costs: torch.Tensor, dense: float, keep: float, bits: int) -> list[Option]:
    shares = [keep * _SPREAD ** (step / _STEPS) for step in range(-_STEPS, _STEPS + 1)]
    ranks = {share: largest_rank(shape, share * dense, bits) for share in shares if share < 1}
    found = [Option(share * dense, float(costs[rank])) for share, rank in ranks.items() if rank]
    if not ranks[shares[0]]:
        found.insert(0, Option(low_rank_form(shape, 1).with_gauge("fixed").stored_bytes(bits), float(costs[1])))
    return [*found, Option(dense, 0.0)] if keep * _SPREAD >= 1 or not found else found


def whole_bytes(shape: tuple[int, int], bits: int) -> int:
    """Return what a file holds for a matrix that stays whole in so many bits, its scales by row included."""
    rows, columns = shape
    return packed_bytes(rows * columns, bits) + rows * SCALE_BYTES


def rounding_error(matrix: torch.Tensor, metric: Metric, bits: int) -> float:
    """Return the squared relative error in the metric of rounding a matrix by row to the nearest."""
    rounded = dequantize_weight(*quantize_weight(matrix, WeightSettings(bits, "per_channel")), matrix.dtype)
    return metric.relative_error(matrix, rounded) ** 2


def memory_groups(layers: Mapping[str, nn.Module], names: Sequence[str]) -> list[list[str]]:
    """Cut the names into groups whose moments fit into memory together."""
    groups: list[list[str]] = []
    room = 0.0
    for name in names:
        need = 16.0 * matrix_shape(layers[name])[1] ** 2
        if not groups or need > room:
            groups.append([])
            room = _LARGEST_MOMENTS
        groups[-1].append(name)
        room -= need
    return groups
