"""The operation "compress_matrices": weights become tensor networks that the data choose, under one budget of bytes."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.quantize import quantize
from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.rounding import round_to_grid
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import Operation, apply_operation, check_order, register_operation, structure_log
from fiftyfold.modules.tensor_network.budget import (
    DENSE_BYTES,
    Allocation,
    memory_groups,
    rounding_error,
    spread_bytes,
    whole_bytes,
)
from fiftyfold.modules.tensor_network.channel_order import ChannelOrders, permute_bias_state, sort_channels
from fiftyfold.modules.tensor_network.decomposition import as_memory_error, balanced, check_finite
from fiftyfold.modules.tensor_network.families import (
    FAMILIES,
    Family,
    best_form,
    has_chain,
    largest_rank,
    low_rank_curve,
    whole_matrix,
)
from fiftyfold.modules.tensor_network.finished_layers import FinishedLayers, finished_layers, same_layers
from fiftyfold.modules.tensor_network.form import NetworkForm
from fiftyfold.modules.tensor_network.layers import (
    PIVOTS,
    TensorNetworkEmbedding,
    TensorNetworkLayer,
    fixed_numbers,
    flat_numbers,
    install_network,
    matrix_of,
    matrix_shape,
    to_dense,
)
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import (
    Batch,
    Moments,
    call_order,
    check_batches,
    collect_moments,
)
from fiftyfold.modules.tensor_network.objective import least_squares
from fiftyfold.modules.tensor_network.sensitivity import outputs_of
from fiftyfold.modules.tensor_network.solvers import SWEEPS
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import install_networks, network_operation, read_forms

OPERATION = "compress_matrices"
"""Kind of a log's entry."""

FAMILIES_BY_DEFAULT: tuple[Family, ...] = ("svd", "sum20", "sum50")
"""Chains alone are left out: the sums come near to what they do, and rarely lose to them."""

_FACTOR_BITS = (8, 16)
_WHOLE_BITS = (3, 4, 8)
_CLEARLY_NEARER = 0.5
"""Where rounding a whole matrix has at most so much of low rank's squared error, no other form is tried."""


@dataclass(frozen=True)
class CompressedMatrix:
    """What became of one matrix.

    Attributes:
        form: its tensor network; nothing if it stayed whole.
        bytes: that a file holds for it.
        error: relative error of the layer's outputs on the calibration text, against the original model's, with the
            inputs that the compressed model gives it.
        whole_bits: of its numbers where it stayed whole and is quantized; nothing otherwise.
    """

    form: NetworkForm | None
    bytes: int
    error: float
    whole_bits: int | None = None


def compress_matrices(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.3,
    *,
    families: Sequence[Family] = FAMILIES_BY_DEFAULT,
    allocation: Allocation = "outputs",
    factor_bits: int = 16,
    whole_bits: Sequence[int] = (),
    compressed_prefix: bool = True,
    sweeps: int = SWEEPS,
    targets: Targets = "default",
    exclude: Targets = (),
    step: int = 0,
    optimizer: Optimizer | None = None,
) -> dict[str, CompressedMatrix]:
    """Replace weight matrices by the tensor networks that change the layers' outputs least on calibration text.

    Each matrix takes the best of several families at its number of bytes, solved for in the metric of its inputs: the
    ones that the model gives it whose earlier layers are compressed already. The target is the output of the original
    model, so that a layer also makes up for those before it; what the mean of its inputs contributes goes into its
    bias, where it has one. All is computed on a copy before the first weight is replaced.

    Args:
        model: any module; it is called with each batch.
        batches: calibration text: tensors, or arguments by name. Padding that an ``attention_mask`` marks is left out.
        keep: share of the bytes that the chosen matrices take in 16 bits; between 0 and 1.
        families: which forms are tried; see :data:`.Family`. Low rank alone, ``("svd",)``, needs no iteration.
        allocation: how the bytes are spread; see :data:`Allocation`.
        factor_bits: 16, or 8 for factors that are quantized by row. They then stand under the quantizer, ready for
            quantization-aware training, and the log gets an entry for that as well.
        whole_bits: of 3, 4 and 8, in which bits a matrix may stay whole, rounded by row in the same metric, where that
            is nearer than a network of its number of bytes. Such layers, too, stand under their quantizers then.
        compressed_prefix: whether each layer sees the inputs of the compressed model; otherwise the original's, which
            takes one pass over the text in place of two for each layer.
        sweeps: of the alternating least squares.
        targets: ``"default"`` (the linear layers of the stacked layers), or patterns, as :func:`.find_matrices` takes.
        exclude: patterns of names to leave out.
        step: the optimizer step at which this happens, for the log.
        optimizer: the optimizer that trains the model, if there is one; the new parameters enter the groups of those
            that they replace.

    Returns:
        What became of each matrix, by name.

    Raises:
        FiftyfoldError: if an argument is impossible, the text is empty or does not suit the model, the budget cannot be
            met, a weight is not finite or memory runs out. The model is then unchanged.
    """
    compression = plan_compression(
        model,
        batches,
        keep,
        families=families,
        allocation=allocation,
        factor_bits=factor_bits,
        whole_bits=whole_bits,
        compressed_prefix=compressed_prefix,
        sweeps=sweeps,
        targets=targets,
        exclude=exclude,
    )
    apply_operation(model, compression.operation(step), [] if optimizer is None else [optimizer])
    compression.give_values(model, [] if optimizer is None else [optimizer])
    for bits, names in compression.quantized(factor_bits).items():
        quantize(
            model,
            weight_bits=bits,
            activation_bits=None,
            granularity="per_channel",
            targets=[f"^{re.escape(name)}$" for name in names],
            step=step,
        )
    return compression.results


class CompressionArguments(TypedDict, total=False):
    """Arguments that :func:`compress_matrices` and what plans for it have in common."""

    families: Sequence[Family]
    allocation: Allocation
    compressed_prefix: bool
    sweeps: int
    targets: Targets
    exclude: Targets


@dataclass(frozen=True)
class Compression:
    """What :func:`compress_matrices` does to a model, found and not yet carried out.

    Attributes:
        results: what becomes of each matrix, by the layer's name.
        values: the state dict of each layer that gets a network, or is rounded, by its name.
        orders: of the channels that were sorted between these layers; their networks and biases have it already.
    """

    results: dict[str, CompressedMatrix]
    values: dict[str, dict[str, torch.Tensor]]
    orders: ChannelOrders

    def operation(self, step: int, part: str = "") -> Operation:
        """Return the log's entry.

        Args:
            step: the optimizer step at which this happens.
            part: name of the part that was planned for, within the model that carries the log.
        """
        prefix = f"{part}." if part else ""
        found = {f"{prefix}{name}": result for name, result in self.results.items()}
        forms = {name: result.form for name, result in found.items() if result.form is not None}
        errors = {name: round(found[name].error, 6) for name in found}
        return network_operation(OPERATION, forms, step) | {"errors": errors}

    def quantized(self, factor_bits: int) -> dict[int, list[str]]:
        """Return which layers are to be quantized by row, by the bits of their numbers."""
        bits = {name: result.whole_bits or factor_bits for name, result in self.results.items() if name in self.values}
        widths = sorted(set(bits.values()) - {16}, reverse=True)
        return {width: [name for name, own in bits.items() if own == width] for width in widths}

    @torch.no_grad()
    def give_values(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Fill the changed layers of ``model``, which has had the operation; its training goes on from there.

        Args:
            model: changed in place.
            optimizers: that train it; what they keep of a bias follows its channels.
        """
        layers = dict(named_layers(model))
        for name, values in self.values.items():
            for key, tensor in layers[name].state_dict().items():
                tensor.copy_(values[key])
        permute_bias_state(model, self.orders, optimizers)


def check_arguments(
    keep: float,
    *,
    factor_bits: int = 16,
    whole_bits: Sequence[int] = (),
    **arguments: Unpack[CompressionArguments],
) -> None:
    """Refuse arguments that no model could make good.

    Raises:
        FiftyfoldError: naming the argument.
    """
    plan = _Plan(bits=factor_bits, whole_bits=whole_bits, **arguments)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise FiftyfoldError(f"keep must be a share between 0 and 1, not {keep!r}.")
    if not plan.families or any(family not in FAMILIES for family in plan.families):
        raise FiftyfoldError(f"families must be some of {', '.join(FAMILIES)}, not {list(plan.families)}.")
    if plan.bits not in _FACTOR_BITS:
        raise FiftyfoldError(f"factor_bits must be 8 or 16, not {plan.bits!r}.")
    if any(bits not in _WHOLE_BITS for bits in plan.whole_bits):
        raise FiftyfoldError(f"whole_bits must be some of 3, 4 and 8, not {list(plan.whole_bits)}.")
    if plan.allocation not in get_args(Allocation):
        allowed = ", ".join(map(repr, get_args(Allocation)))
        raise FiftyfoldError(f"allocation must be one of {allowed}, not {plan.allocation!r}.")


def plan_compression(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.3,
    *,
    factor_bits: int = 16,
    whole_bits: Sequence[int] = (),
    **arguments: Unpack[CompressionArguments],
) -> Compression:
    """Find what :func:`compress_matrices` would carry out, and change nothing.

    Raises:
        FiftyfoldError: as :func:`compress_matrices` does.
    """
    check_order(structure_log(model), [OPERATION])
    check_arguments(keep, factor_bits=factor_bits, whole_bits=whole_bits, **arguments)
    plan = _Plan(bits=factor_bits, whole_bits=whole_bits, **arguments)
    found = check_batches(batches)
    names = _matrices(model, plan.targets, plan.exclude)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        sizes = spread_bytes(
            model, names, found, keep=keep, allocation=plan.allocation, bits=factor_bits, whole_bits=whole_bits
        )
        student, results, orders = _compressed_copy(model, names, found, sizes, plan)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise as_memory_error(error, max(matrix_shape(dict(named_layers(model))[name]) for name in names)) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    layers = dict(named_layers(student))
    # Not on a GPU: another rank may have another one.
    values = {
        name: {key: tensor.cpu() for key, tensor in layers[name].state_dict().items()}
        for name, result in results.items()
        if result.form is not None or result.whole_bits is not None
    }
    if not values:
        raise FiftyfoldError(f"every matrix stays dense at keep={keep}; lower it.")
    return Compression(results, values, orders.cpu())


@dataclass(frozen=True)
class _Plan:
    bits: int
    whole_bits: Sequence[int] = ()
    families: Sequence[Family] = FAMILIES_BY_DEFAULT
    allocation: Allocation = "outputs"
    compressed_prefix: bool = True
    sweeps: int = SWEEPS
    targets: Targets = "default"
    exclude: Targets = ()


def _matrices(model: nn.Module, targets: Targets, exclude: Targets) -> list[str]:
    names, layers = find_matrices(model, targets, exclude), dict(named_layers(model))
    owners: dict[int, str] = {}
    for name in names:
        if isinstance(layers[name], nn.Embedding | TensorNetworkEmbedding):
            raise FiftyfoldError(f"{name!r} is an embedding, whose inputs have no metric; exclude it, or tensorize it.")
        first = owners.setdefault(id(layers[name].weight), name)
        if first != name:
            raise FiftyfoldError(f"{name!r} and {first!r} share a weight but not their inputs; exclude both.")
        try:
            check_finite(matrix_of(layers[name]))
        except FiftyfoldError as error:
            raise FiftyfoldError(f"{name}: {error}") from error
    return names


def _compressed_copy(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    sizes: Mapping[str, float],
    plan: _Plan,
) -> tuple[nn.Module, dict[str, CompressedMatrix], ChannelOrders]:
    student = copy.deepcopy(model)
    layers = dict(named_layers(student))
    small = [
        name
        for name in names
        if not _stays_dense(layers[name], sizes[name]) and not _widths(layers[name], sizes[name], plan)
    ]
    orders = ChannelOrders()
    if has_chain(plan.families):
        orders = sort_channels(student, small, batches, functools.partial(_first_error, sizes, plan))
    results: dict[str, CompressedMatrix] = {}
    stages = call_order(model, names, batches[0]) if plan.compressed_prefix else memory_groups(layers, names)
    finished = _finished(model, student, batches[0]) if plan.compressed_prefix else {}
    for stage in stages:
        source, reference = (student, model) if plan.compressed_prefix and results else (model, None)
        last = stage[-1] if plan.compressed_prefix else None
        moments = collect_moments(source, stage, batches, reference, last=last, finished=finished)
        for name in stage:
            known = moments.pop(name)
            if (order := orders.columns.get(name)) is not None:
                known = known.reordered(order, both=source is model)
            results[name] = _compress(layers[name], known, sizes[name], plan)
    return student, {name: results[name] for name in names}, orders


def _finished(model: nn.Module, student: nn.Module, batch: Batch) -> dict[nn.Module, FinishedLayers]:
    found = finished_layers(model, lambda: outputs_of(model, batch).values)
    return {model: found, student: same_layers(found, student)}


def _first_error(sizes: Mapping[str, float], plan: _Plan, name: str, matrix: torch.Tensor, metric: Metric) -> float:
    """Return the squared relative error of the best form after one sweep."""
    form, networks = best_form(matrix, metric, tuple(plan.families), sizes[name], plan.bits, sweeps=1)
    return metric.relative_error(matrix, whole_matrix(networks, form.shape)) ** 2


def _stays_dense(layer: nn.Module, size: float) -> bool:
    return size >= DENSE_BYTES * math.prod(matrix_shape(layer))


@torch.no_grad()
def _compress(layer: nn.Module, moments: Moments, size: float, plan: _Plan) -> CompressedMatrix:
    if _stays_dense(layer, size):
        return CompressedMatrix(None, DENSE_BYTES * math.prod(matrix_shape(layer)), 0.0)
    original = matrix_of(layer)
    target, metric = least_squares(layer, moments)
    result = _keep_whole(layer, target, metric, size, plan) or _install_best(layer, target, metric, size, plan)
    old, built = getattr(layer, "bias", None), matrix_of(layer).to(target.dtype)
    if isinstance(old, torch.Tensor):
        old.data = (old + original.double() @ moments.original_mean - built.double() @ moments.mean).to(old.dtype)
    return replace(result, error=metric.relative_error(target, built))


def _widths(layer: nn.Module, size: float, plan: _Plan) -> list[int]:
    """Return the bits in which the layer's matrix may stay whole in so many bytes, the most first."""
    # Nothing in the log makes a network dense again.
    if isinstance(layer, TensorNetworkLayer):
        return []
    return [bits for bits in sorted(plan.whole_bits, reverse=True) if whole_bytes(matrix_shape(layer), bits) <= size]


def _keep_whole(
    layer: nn.Module, target: torch.Tensor, metric: Metric, size: float, plan: _Plan
) -> CompressedMatrix | None:
    """Round the matrix in place unless it is too large, or a network of its size may be nearer, as low rank tells."""
    shape, widths = matrix_shape(layer), _widths(layer, size, plan)
    if not widths:
        return None
    rounded = round_to_grid(target, metric.moment, widths[0])
    bound = _CLEARLY_NEARER * float(low_rank_curve(target, metric)[largest_rank(shape, size, plan.bits)])
    if plan.bits < 16:
        bound = max(bound, rounding_error(target, metric, plan.bits))
    if metric.relative_error(target, rounded) ** 2 > bound:
        return None
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    # Another tensor: the old one is still the original that the bias is made up from.
    weight.data = (rounded.t() if isinstance(layer, Conv1D) else rounded).to(weight.dtype).contiguous()
    return CompressedMatrix(None, whole_bytes(shape, widths[0]), 0.0, widths[0])


def _install_best(layer: nn.Module, target: torch.Tensor, metric: Metric, size: float, plan: _Plan) -> CompressedMatrix:
    form, networks = best_form(target, metric, tuple(plan.families), size, plan.bits, sweeps=plan.sweeps)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    # Factors of unlike size learn at unlike speed: what heals best is what starts balanced.
    numbers, pivots = flat_numbers([balanced(cores) for cores in networks]), None
    if plan.bits < 16:
        form = form.with_gauge("fixed")
        numbers, pivots = fixed_numbers(networks)
        numbers = _rounded(numbers, form, plan.bits)
    if isinstance(layer, TensorNetworkLayer):
        to_dense(layer)
    install_network(layer, form, nn.Parameter(numbers.to(weight.dtype), requires_grad=weight.requires_grad))
    if pivots is not None:
        layer.get_buffer(PIVOTS).copy_(pivots)
    return CompressedMatrix(form, form.with_gauge("fixed").stored_bytes(plan.bits), 0.0)


def _rounded(numbers: torch.Tensor, form: NetworkForm, bits: int) -> torch.Tensor:
    """Return numbers as their quantizer, by row, will read them."""
    settings, parts = WeightSettings(bits, "per_channel"), []
    for part, shape in zip(numbers.split([a * b for a, b in form.matrix_shapes]), form.matrix_shapes, strict=True):
        whole = part.numel() == 0
        parts.append(part if whole else dequantize_weight(*quantize_weight(part.view(shape), settings)).flatten())
    return torch.cat(parts)


def _replay(model: nn.Module, operation: Operation) -> None:
    install_networks(model, read_forms(operation), compute=False)


register_operation(OPERATION, _replay, forbidden_after=["quantize"])
