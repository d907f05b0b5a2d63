"""The operation "compress_matrices": weights become tensor networks that the data choose, under one budget of bytes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fiftyfold.errors import FiftyfoldError
from fiftyfold.modules.quantization.quantize import quantize
from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.quantization.targets import Targets, named_layers
from fiftyfold.modules.structure import Operation, apply_operation, check_order, register_operation, structure_log
from fiftyfold.modules.tensor_network.allocation import Option, allocate
from fiftyfold.modules.tensor_network.decomposition import as_memory_error, check_finite
from fiftyfold.modules.tensor_network.families import FAMILIES, Family, best_form, largest_rank, low_rank_curve
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
from fiftyfold.modules.tensor_network.sensitivity import measured_sensitivity
from fiftyfold.modules.tensor_network.solvers import SWEEPS
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import install_networks, network_operation, read_forms

OPERATION = "compress_matrices"
"""Kind of a log's entry."""

Allocation = Literal["model", "outputs", "uniform"]
"""``model``: bytes go where they lower the whole model's deviation, measured one matrix at a time. ``outputs``: where
they lower the squared relative errors of the layers' outputs, known from one pass. ``uniform``: the same share for all.
"""

_FACTOR_BITS = (8, 16)
_DENSE_BYTES = 2
_SHARES = (0.03, 0.05, 0.08, *(step / 20 for step in range(2, 20)))
_LARGEST_DOUBLE = 512
_LARGEST_MOMENTS = 2 * 2**30


@dataclass(frozen=True)
class CompressedMatrix:
    """What became of one matrix.

    Attributes:
        form: its tensor network; nothing if it stayed dense.
        bytes: that a file holds for it.
        error: relative error of the layer's outputs on the calibration text, against the original model's, with the
            inputs that the compressed model gives it.
    """

    form: NetworkForm | None
    bytes: int
    error: float


def compress_matrices(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float = 0.3,
    *,
    families: Sequence[Family] = ("svd", "sum20", "sum50"),
    allocation: Allocation = "outputs",
    factor_bits: int = 16,
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
    check_order(structure_log(model), [OPERATION])
    _check_arguments(keep, families, factor_bits, allocation)
    found = check_batches(batches)
    names = _matrices(model, targets, exclude)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plan = _Plan(tuple(families), factor_bits, sweeps, compressed_prefix)
        sizes = _spread(model, names, found, keep=keep, allocation=allocation, bits=factor_bits)
        student, results = _compressed_copy(model, names, found, sizes, plan)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise as_memory_error(error, max(matrix_shape(dict(named_layers(model))[name]) for name in names)) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    forms = {name: result.form for name, result in results.items() if result.form is not None}
    if not forms:
        raise FiftyfoldError(f"every matrix stays dense at keep={keep}; lower it.")
    operation = network_operation(OPERATION, forms, step)
    operation["errors"] = {name: round(result.error, 6) for name, result in results.items()}
    apply_operation(model, operation, [] if optimizer is None else [optimizer])
    _take_values(model, student, list(forms))
    if factor_bits < 16:
        quantize(
            model,
            weight_bits=factor_bits,
            activation_bits=None,
            granularity="per_channel",
            targets=[f"^{re.escape(name)}$" for name in forms],
            step=step,
        )
    return results


@dataclass(frozen=True)
class _Plan:
    families: tuple[Family, ...]
    bits: int
    sweeps: int
    compressed_prefix: bool


def _check_arguments(keep: float, families: Sequence[str], factor_bits: int, allocation: str) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < 1:
        raise FiftyfoldError(f"keep must be a share between 0 and 1, not {keep!r}.")
    if not families or any(family not in FAMILIES for family in families):
        raise FiftyfoldError(f"families must be some of {', '.join(FAMILIES)}, not {list(families)}.")
    if factor_bits not in _FACTOR_BITS:
        raise FiftyfoldError(f"factor_bits must be 8 or 16, not {factor_bits!r}.")
    if allocation not in ("model", "outputs", "uniform"):
        raise FiftyfoldError(f"allocation must be 'model', 'outputs' or 'uniform', not {allocation!r}.")


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


def _spread(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    keep: float,
    allocation: Allocation,
    bits: int,
) -> dict[str, float]:
    """Return the bytes that each matrix may take."""
    layers = dict(named_layers(model))
    dense = {name: _DENSE_BYTES * matrix_shape(layers[name])[0] * matrix_shape(layers[name])[1] for name in names}
    if allocation == "uniform":
        return {name: keep * size for name, size in dense.items()}
    curves: dict[str, torch.Tensor] = {}
    for group in _groups(layers, names):
        for name, moments in collect_moments(model, group, batches).items():
            curves[name] = low_rank_curve(*_problem(layers[name], moments))
    weights = dict.fromkeys(names, 1.0)
    if allocation == "model":
        ranks = {name: largest_rank(matrix_shape(layers[name]), keep * dense[name], bits) for name in names}
        weights = measured_sensitivity(model, batches, curves, ranks)
    options = [_options(matrix_shape(layers[name]), curves[name] * weights[name], dense[name], bits) for name in names]
    chosen = allocate(options, keep * sum(dense.values()))
    return {name: each[index].bytes for name, each, index in zip(names, options, chosen, strict=True)}


def _options(shape: tuple[int, int], costs: torch.Tensor, dense: float, bits: int) -> list[Option]:
    found = []
    for share in _SHARES:
        rank = largest_rank(shape, share * dense, bits)
        if rank:
            found.append(Option(share * dense, float(costs[rank])))
    return [*found, Option(dense, 0.0)]


def _groups(layers: Mapping[str, nn.Module], names: Sequence[str]) -> list[list[str]]:
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


def _compressed_copy(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    sizes: Mapping[str, float],
    plan: _Plan,
) -> tuple[nn.Module, dict[str, CompressedMatrix]]:
    student = copy.deepcopy(model)
    layers, originals = dict(named_layers(student)), dict(named_layers(model))
    results: dict[str, CompressedMatrix] = {}
    stages = call_order(model, names, batches[0]) if plan.compressed_prefix else _groups(originals, names)
    for stage in stages:
        source, reference = (student, model) if plan.compressed_prefix and results else (model, None)
        moments = collect_moments(source, stage, batches, reference, last=stage[-1] if plan.compressed_prefix else None)
        for name in stage:
            results[name] = _compress(layers[name], originals[name], moments.pop(name), sizes[name], plan)
    return student, {name: results[name] for name in names}


def _problem(layer: nn.Module, moments: Moments) -> tuple[torch.Tensor, Metric]:
    """Return the matrix to stand near to, and the metric: the least squares solution for the original's outputs."""
    matrix = matrix_of(layer)
    kind = torch.float64 if max(matrix.shape) <= _LARGEST_DOUBLE else torch.float32
    metric = Metric(moments.inputs.to(kind))
    matrix = matrix.to(kind)
    if not torch.equal(moments.cross, moments.inputs):
        # W E[x x̂ᵀ] = W⋆ E[x̂ x̂ᵀ], solved for the change of W, so that the damping pulls towards W itself.
        scale = float(moments.inputs.diagonal().mean()) or 1.0
        change = matrix @ ((moments.cross - moments.inputs).to(kind) / scale)
        root = metric.root()
        inverse = torch.linalg.pinv(root)
        matrix = matrix + change @ inverse.T @ inverse
    return matrix, metric


@torch.no_grad()
def _compress(layer: nn.Module, original: nn.Module, moments: Moments, size: float, plan: _Plan) -> CompressedMatrix:
    rows, columns = matrix_shape(original)
    if size >= _DENSE_BYTES * rows * columns:
        return CompressedMatrix(None, _DENSE_BYTES * rows * columns, 0.0)
    target, metric = _problem(original, moments)
    form, networks = best_form(target, metric, plan.families, size, plan.bits, sweeps=plan.sweeps)
    weight = original.weight
    assert isinstance(weight, torch.Tensor)
    numbers, pivots = flat_numbers(networks), None
    if plan.bits < 16:
        form = form.with_gauge("fixed")
        numbers, pivots = fixed_numbers(networks)
        numbers = _rounded(numbers, form, plan.bits)
    if isinstance(layer, TensorNetworkLayer):
        to_dense(layer)
    install_network(layer, form, nn.Parameter(numbers.to(weight.dtype), requires_grad=weight.requires_grad))
    assert isinstance(layer, TensorNetworkLayer)
    if pivots is not None:
        layer.get_buffer(PIVOTS).copy_(pivots)
    built = layer.dense_weight().to(target.dtype)
    bias, old = getattr(layer, "bias", None), getattr(original, "bias", None)
    if bias is not None:
        assert isinstance(old, torch.Tensor)
        matrix = matrix_of(original).double()
        bias.data = (old + matrix @ moments.original_mean - built.double() @ moments.mean).to(old.dtype)
    error = metric.relative_error(target, built)
    return CompressedMatrix(form, form.with_gauge("fixed").stored_bytes(plan.bits), error)


def _rounded(numbers: torch.Tensor, form: NetworkForm, bits: int) -> torch.Tensor:
    """Return numbers as their quantizer, by row, will read them."""
    settings, parts = WeightSettings(bits, "per_channel"), []
    for part, shape in zip(numbers.split([a * b for a, b in form.matrix_shapes]), form.matrix_shapes, strict=True):
        whole = part.numel() == 0
        parts.append(part if whole else dequantize_weight(*quantize_weight(part.view(shape), settings)).flatten())
    return torch.cat(parts)


@torch.no_grad()
def _take_values(model: nn.Module, student: nn.Module, names: Sequence[str]) -> None:
    layers, sources = dict(named_layers(model)), dict(named_layers(student))
    for name in names:
        values = sources[name].state_dict()
        for key, tensor in layers[name].state_dict().items():
            tensor.copy_(values[key])


def _replay(model: nn.Module, operation: Operation) -> None:
    install_networks(model, read_forms(operation), compute=False)


register_operation(OPERATION, _replay, forbidden_after=["quantize"])
