"""What becomes of one matrix within its number of bytes: a tensor network, or the whole of it in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fiftyfold.modules.journal import number
from fiftyfold.modules.quantization.quantizers import dequantize_weight, quantize_weight
from fiftyfold.modules.quantization.rounding import round_to_grid
from fiftyfold.modules.quantization.settings import WeightSettings
from fiftyfold.modules.quantization.targets import Targets
from fiftyfold.modules.tensor_network.budget import DENSE_BYTES, Allocation, rounding_error, whole_bytes
from fiftyfold.modules.tensor_network.decomposition import balanced
from fiftyfold.modules.tensor_network.families import Family, best_form, largest_rank, low_rank_curve, whole_matrix
from fiftyfold.modules.tensor_network.form import NetworkForm
from fiftyfold.modules.tensor_network.layers import (
    TensorNetworkLayer,
    fixed_numbers,
    flat_numbers,
    install_network,
    matrix_of,
    matrix_shape,
    to_dense,
)
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Moments
from fiftyfold.modules.tensor_network.objective import least_squares
from fiftyfold.modules.tensor_network.solvers import SWEEPS

FAMILIES_BY_DEFAULT: tuple[Family, ...] = ("svd", "sum20", "sum50")
"""Chains alone are left out: the sums come near to what they do, and rarely lose to them."""

WHOLE_BITS = (3, 4, 8)
"""In which a matrix may stay whole."""

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

    @property
    def is_changed(self) -> bool:
        """Whether the layer is not the one that it was."""
        return self.form is not None or self.whole_bits is not None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "form": None if self.form is None else self.form.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CompressedMatrix:
        """Read what :meth:`to_json` wrote, perhaps altered since.

        Raises:
            FiftyfoldError: if the form is impossible.
            ValueError: if a number is none, or anything is missing.
            TypeError: if anything is unknown.
        """
        form = None if values["form"] is None else NetworkForm.from_json(values["form"])
        number(values["error"]), number(values["bytes"])
        if values["whole_bits"] not in (None, *WHOLE_BITS):
            raise ValueError(f"no matrix stays whole in {values['whole_bits']} bits")
        return cls(**{**values, "form": form})


@dataclass(frozen=True)
class Plan:
    """The arguments of :func:`.compress_matrices`, which explains them."""

    factor_bits: int = 16
    whole_bits: Sequence[int] = ()
    families: Sequence[Family] = FAMILIES_BY_DEFAULT
    allocation: Allocation = "model"
    compressed_prefix: bool = True
    sweeps: int = SWEEPS
    targets: Targets = "default"
    exclude: Targets = ()


def first_error(sizes: Mapping[str, float], plan: Plan, name: str, matrix: torch.Tensor, metric: Metric) -> float:
    """Return the squared relative error of the best form after one sweep."""
    form, networks = best_form(matrix, metric, tuple(plan.families), sizes[name], plan.factor_bits, sweeps=1)
    return metric.relative_error(matrix, whole_matrix(networks, form.shape)) ** 2


def stays_dense(layer: nn.Module, size: float) -> bool:
    """Tell whether so many bytes are enough for the matrix as it is."""
    return size >= DENSE_BYTES * math.prod(matrix_shape(layer))


@torch.no_grad()
def compress_matrix(layer: nn.Module, moments: Moments, size: float, plan: Plan) -> CompressedMatrix:
    """Put into a layer, in place, what serves its outputs best in so many bytes; its bias takes up the mean.

    Args:
        layer: a linear one.
        moments: of its inputs.
        size: bytes.
        plan: what is tried.
    """
    if stays_dense(layer, size):
        return CompressedMatrix(None, DENSE_BYTES * math.prod(matrix_shape(layer)), 0.0)
    original = matrix_of(layer)
    target, metric = least_squares(layer, moments)
    result = _keep_whole(layer, target, metric, size, plan) or _install_best(layer, target, metric, size, plan)
    old, built = getattr(layer, "bias", None), matrix_of(layer).to(target.dtype)
    if isinstance(old, torch.Tensor):
        old.data = (old + original.double() @ moments.original_mean - built.double() @ moments.mean).to(old.dtype)
    return replace(result, error=metric.relative_error(target, built))


@torch.no_grad()
def restore_matrix(layer: nn.Module, result: CompressedMatrix, values: Mapping[str, torch.Tensor]) -> None:
    """Put into a layer, in place, what :func:`compress_matrix` put there before.

    Args:
        layer: as it was then.
        result: what became of it.
        values: its state dict.

    Raises:
        FiftyfoldError: if the result is not that of such a layer.
        ValueError: if the values are not.
    """
    if result.form is not None:
        if isinstance(layer, TensorNetworkLayer):
            to_dense(layer)
        install_network(layer, result.form)
    own = layer.state_dict()
    if {name: each.shape for name, each in own.items()} != {name: each.shape for name, each in values.items()}:
        raise ValueError("its tensors are not those of the layer")
    for name, tensor in own.items():
        tensor.copy_(values[name])


def whole_widths(layer: nn.Module, size: float, plan: Plan) -> list[int]:
    """Return the bits in which the layer's matrix may stay whole in so many bytes, the most first."""
    # Nothing in the log makes a network dense again.
    if isinstance(layer, TensorNetworkLayer):
        return []
    return [bits for bits in sorted(plan.whole_bits, reverse=True) if whole_bytes(matrix_shape(layer), bits) <= size]


def _keep_whole(
    layer: nn.Module, target: torch.Tensor, metric: Metric, size: float, plan: Plan
) -> CompressedMatrix | None:
    """Round the matrix in place unless it is too large, or a network of its size may be nearer, as low rank tells."""
    shape, widths = matrix_shape(layer), whole_widths(layer, size, plan)
    if not widths:
        return None
    rounded = round_to_grid(target, metric.moment, widths[0])
    bound = _CLEARLY_NEARER * float(low_rank_curve(target, metric)[largest_rank(shape, size, plan.factor_bits)])
    if plan.factor_bits < 16:
        bound = max(bound, rounding_error(target, metric, plan.factor_bits))
    if metric.relative_error(target, rounded) ** 2 > bound:
        return None
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    # Another tensor: the old one is still the original that the bias is made up from.
    weight.data = (rounded.t() if isinstance(layer, Conv1D) else rounded).to(weight.dtype).contiguous()
    return CompressedMatrix(None, whole_bytes(shape, widths[0]), 0.0, widths[0])


def _install_best(layer: nn.Module, target: torch.Tensor, metric: Metric, size: float, plan: Plan) -> CompressedMatrix:
    form, networks = best_form(target, metric, tuple(plan.families), size, plan.factor_bits, sweeps=plan.sweeps)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    # Factors of unlike size learn at unlike speed: what heals best is what starts balanced.
    numbers, pivots = flat_numbers([balanced(cores) for cores in networks]), None
    if plan.factor_bits < 16:
        form = form.with_gauge("fixed")
        numbers, pivots = fixed_numbers(networks)
        numbers = _rounded(numbers, form, plan.factor_bits)
    if isinstance(layer, TensorNetworkLayer):
        to_dense(layer)
    install_network(layer, form, nn.Parameter(numbers.to(weight.dtype), requires_grad=weight.requires_grad), pivots)
    return CompressedMatrix(form, form.with_gauge("fixed").stored_bytes(plan.factor_bits), 0.0)


def _rounded(numbers: torch.Tensor, form: NetworkForm, bits: int) -> torch.Tensor:
    """Return numbers as their quantizer, by row, will read them."""
    settings, parts = WeightSettings(bits, "per_channel"), []
    for part, shape in zip(numbers.split([a * b for a, b in form.matrix_shapes]), form.matrix_shapes, strict=True):
        whole = part.numel() == 0
        parts.append(part if whole else dequantize_weight(*quantize_weight(part.view(shape), settings)).flatten())
    return torch.cat(parts)
