"""The metric of a layer's inputs: how much an error of the weight matters to the outputs.

For inputs x with second moment C = E[xxᵀ], replacing the weight W by Ŵ changes the outputs, on average, by
tr[(W − Ŵ) C (W − Ŵ)ᵀ]. C may be of any rank and scale: it is damped, and its eigenvalues are clamped, so that nothing
here fails on it.
"""

from __future__ import annotations

import torch

from fiftyfold.errors import FiftyfoldError

DAMPING = 1e-4
"""Share of the mean squared input that is added to every direction, so that directions without data cost something."""

_SMALLEST = 1e-12


class Metric:
    """The second moment of a layer's inputs, damped.

    Args:
        moment: E[xxᵀ], or the sum over tokens, (inputs, inputs), symmetric and positive semidefinite up to rounding.
        damping: share of its mean diagonal that is added to the diagonal.

    Attributes:
        moment: the damped moment with a mean diagonal of 1, in the type of the given one.

    Raises:
        FiftyfoldError: if the moment is no finite square matrix.
    """

    def __init__(self, moment: torch.Tensor, damping: float = DAMPING) -> None:
        if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or not bool(moment.isfinite().all()):
            raise FiftyfoldError("the second moment of a layer's inputs must be a square matrix of finite numbers.")
        symmetric = (moment + moment.T) / 2
        scale = float(symmetric.diagonal().mean())
        # Inputs that are always zero tell nothing: every direction then counts the same.
        symmetric = symmetric / scale if scale > 0 else torch.zeros_like(symmetric)
        symmetric.diagonal().add_(damping if scale > 0 else 1.0)
        self.moment = symmetric
        self._root: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Number of inputs."""
        return len(self.moment)

    def root(self) -> torch.Tensor:
        """Return R with R Rᵀ = the moment, its eigenvalues clamped to be positive; kept for the next call."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.moment)
            floor = float(values[-1]) * _SMALLEST
            self._root = vectors * values.clamp(min=floor).sqrt()
        return self._root

    def squared(self, error: torch.Tensor) -> float:
        """Return tr[E C Eᵀ] of an error E, (outputs, inputs)."""
        return float(((error @ self.moment) * error).sum())

    def relative_error(self, matrix: torch.Tensor, approximation: torch.Tensor) -> float:
        """Return the relative error of the outputs, the root of tr[E C Eᵀ] over that of the matrix itself."""
        whole = self.squared(matrix)
        if whole <= 0:
            return 0.0
        return float(max(0.0, self.squared(matrix - approximation) / whole) ** 0.5)
