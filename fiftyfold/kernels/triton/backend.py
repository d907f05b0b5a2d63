"""The Triton kernels as the backend of a device."""

from __future__ import annotations

import torch

from fiftyfold.kernels.backends import Backend
from fiftyfold.kernels.triton.embedding import packed_embedding
from fiftyfold.kernels.triton.linear import packed_linear
from fiftyfold.kernels.triton.planes import arrange_planes


def arrange(codes: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """Return binary or ternary codes in planes, as one row; with scales per group, the codes as they are.

    Groups are multiplied by torch's own operations, since their sums must be rescaled one by one.
    """
    return codes if groups > 1 else arrange_planes(codes, bits)


BACKEND = Backend(arrange=arrange, linear=packed_linear, embedding=packed_embedding)
"""What :func:`fiftyfold.kernels.triton.find_backend` finds."""
