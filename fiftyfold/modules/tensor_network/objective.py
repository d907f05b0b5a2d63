"""What the cores that replace a matrix must come near to, and in which metric."""

from __future__ import annotations

import torch
from torch import nn

from fiftyfold.modules.tensor_network.layers import matrix_of
from fiftyfold.modules.tensor_network.metric import Metric
from fiftyfold.modules.tensor_network.moments import Moments

_LARGEST_DOUBLE = 512


def least_squares(layer: nn.Module, moments: Moments) -> tuple[torch.Tensor, Metric]:
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
