"""Compressions of the literature at a share of the bytes, and those of their parts that fiftyfold has too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fiftyfold.modules import quantize, tensorize
from fiftyfold.modules.structure import apply_operation
from fiftyfold.modules.tensor_network.decomposition import balanced
from fiftyfold.modules.tensor_network.form import NetworkForm, low_rank_form
from fiftyfold.modules.tensor_network.layers import (
    change_gauge,
    flat_numbers,
    matrix_of,
    matrix_shape,
    network_layers,
)
from fiftyfold.modules.tensor_network.moments import Batch, collect_moments
from fiftyfold.modules.tensor_network.targets import find_matrices
from fiftyfold.modules.tensor_network.tensorize import OPERATION, network_operation

DAMPING = 1e-4

Grams = Mapping[str, Tensor]
"""The mean of x·xᵀ over calibration tokens, by the name of the layer that reads x, float64."""

METHODS: dict[str, Callable[[nn.Module, float, Grams], None]] = {
    "svd": lambda model, share, _: _tensorize(model, share, 2, "low_rank"),
    "whitened-svd": lambda model, share, grams: whitened_svd(model, share, grams, fixed=False),
    "mpo-2": lambda model, share, _: _tensorize(model, share, 2, "even"),
    "mpo-3": lambda model, share, _: _tensorize(model, share, 3, "even"),
    "whitened-svd-gauge": lambda model, share, grams: whitened_svd(model, share, grams, fixed=True),
}
PLAIN_BITS = {"int8": 8, "int4": 4}


def compress(student: nn.Module, method: str, share: float, bits: int, grams: Grams) -> None:
    """Compress the matrices of the stacked layers, whose numbers :func:`quantize_numbers` brings to few bits.

    Args:
        student: changed in place.
        method: one of :data:`METHODS`; others change nothing here.
        share: bytes to keep, of those in 16 bits; scales come on top.
        bits: that a number will have.
        grams: what whitened methods need.
    """
    if method in METHODS:
        # Numbers of half the bytes: twice as many.
        METHODS[method](student, share * 16 / bits, grams)


def quantize_numbers(student: nn.Module, method: str, bits: int) -> None:
    """Quantize by row what :func:`compress` left of the matrices of the stacked layers, in place."""
    targets = [f"^{name}$".replace(".", r"\.") for name in find_matrices(student)]
    if "gauge" in method:
        # Quantized numbers cannot be brought to another gauge at export: it must be fixed before.
        for _, layer in network_layers(student):
            change_gauge(layer, "fixed")
    quantize(student, weight_bits=bits, activation_bits=None, granularity="per_channel", targets=targets)


def whitened_svd(model: nn.Module, share: float, grams: Grams, *, fixed: bool) -> None:
    """Replace the blocks' matrices by the products of thin matrices that are nearest in the activations' metric.

    SVD-LLM's objective, by the eigenvectors of the damped second moments instead of a Cholesky factor.

    Args:
        model: changed in place.
        share: numbers kept.
        grams: second moments of each matrix's input.
        fixed: count the numbers that a fixed gauge keeps, which affords a larger rank.
    """
    layers = dict(model.named_modules())
    forms: dict[str, NetworkForm] = {}
    numbers: dict[str, Tensor] = {}
    for name in find_matrices(model):
        shape = matrix_shape(layers[name])
        forms[name] = low_rank_form(shape, low_rank(shape, share, fixed=fixed))
        rank = forms[name].terms[0].bonds[0]
        weight, gram = matrix_of(layers[name]).double(), grams[name]
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp(min=0) + DAMPING * values.mean()
        root, inverse = (vectors * values.pow(power) @ vectors.T for power in (0.5, -0.5))
        left, sizes, right = torch.linalg.svd(weight @ root, full_matrices=False)
        cores = [
            (left[:, :rank] * sizes[:rank]).view(1, shape[0], 1, rank),
            (right[:rank] @ inverse).view(rank, 1, shape[1], 1),
        ]
        numbers[name] = flat_numbers([balanced(cores)])
    apply_operation(model, network_operation(OPERATION, forms, 0))
    with torch.no_grad():
        for name, values in numbers.items():
            model.get_submodule(name).get_parameter("weight").copy_(values)


def low_rank(shape: tuple[int, int], share: float, *, fixed: bool) -> int:
    """Return the largest rank whose factors have at most a share of the matrix's numbers, at least 1."""
    rows, columns = shape
    rank = 1
    while rank < min(shape):
        following = rank + 1
        count = following * (rows + columns - (following if fixed else 0))
        # Each row of the identity block is named by two bytes: a number of float16.
        if count + (following if fixed else 0) > share * rows * columns:
            break
        rank = following
    return rank


def activation_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the mean of x·xᵀ over all tokens for the input x of each of the blocks' matrices."""
    found = collect_moments(model, find_matrices(model), batches)
    return {name: each.inputs + torch.outer(each.mean, each.mean).to(each.inputs) for name, each in found.items()}


def _tensorize(model: nn.Module, share: float, cores: int, split: Any) -> None:
    tensorize(model, cores=cores, split=split, keep=min(share, 0.999))
