"""The layout of packed weights on a GPU: planes of inputs, so that one tile of bytes feeds several products.

The inputs of an output are cut into blocks of 256. A block of binary weights takes 32 bytes, one of ternary weights 64;
with ``bits`` bits a weight and ``8 // bits`` planes, bit ``bits * plane`` of byte ``i`` belongs to input
``i + plane * bytes`` of the block. A shift and a mask turn a tile of bytes into the weights of consecutive inputs: no
gather, no interleaving. Weights are stored as ``(code + 1) / 2`` (binary) and ``code + 1`` (ternary); what fills up the
last block meets inputs that are 0.

An *arranged* weight is that in one row, followed by an unused byte for each input: so its length tells how many inputs
it has, and a kernel that was called with others can be refused without waiting for the GPU.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError

BLOCK = 256
"""Inputs in a block."""

PLANE_BITS = (1, 2)
"""Bits for which there is this layout: binary and ternary weights."""


def block_bytes(bits: int) -> int:
    """Return the bytes of a block, which is also the number of inputs in a plane."""
    return BLOCK * bits // 8


def padded_inputs(inputs: int) -> int:
    """Return the inputs of whole blocks."""
    return -(-inputs // BLOCK) * BLOCK


def arranged_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Return the length of an arranged weight, which no other number of inputs has."""
    return outputs * _row_bytes(inputs, bits) + inputs


def arrange_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (outputs, inputs), int8, as an arranged weight: uint8, one-dimensional.

    Raises:
        FiftyfoldError: if there is no such layout for ``bits``.
    """
    return F.pad(to_planes(codes, bits).flatten(), (0, codes.shape[1]))


def arranged_planes(weight: torch.Tensor, outputs: int, inputs: int, bits: int) -> torch.Tensor:
    """Return what :func:`to_planes` returned for an arranged weight, without a copy.

    Raises:
        FiftyfoldError: if the weight is not one of these sizes.
    """
    size = arranged_bytes(outputs, inputs, bits) if bits in PLANE_BITS else -1
    if weight.dtype != torch.uint8 or weight.shape != (size,) or not weight.is_contiguous():
        raise FiftyfoldError("the weight was not arranged for this input, these scales and these bits on a GPU.")
    row = _row_bytes(inputs, bits)
    return weight.as_strided((outputs, row), (row, 1))


def to_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Lay out the codes of a weight for a GPU.

    Args:
        codes: int8, (outputs, inputs).
        bits: 1 (binary) or 2 (ternary).

    Returns:
        uint8, (outputs, blocks * block_bytes(bits)), on the device of ``codes``.

    Raises:
        FiftyfoldError: if there is no such layout for ``bits``.
    """
    if bits not in PLANE_BITS:
        raise FiftyfoldError(f"weights of {bits!r} bits have no layout in planes; only binary and ternary ones have.")
    outputs, inputs = codes.shape
    stored = codes.new_zeros((outputs, padded_inputs(inputs)), dtype=torch.uint8)
    stored[:, :inputs] = (codes > 0) if bits == 1 else codes + 1
    planes = stored.view(outputs, -1, 8 // bits, block_bytes(bits))
    packed = torch.zeros_like(planes[:, :, 0])
    for plane in range(8 // bits):
        packed |= planes[:, :, plane] << (bits * plane)
    return packed.reshape(outputs, -1)


def from_planes(packed: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """Read what :func:`to_planes` wrote: int8, (outputs, inputs)."""
    blocks = packed.view(len(packed), -1, 1, block_bytes(bits))
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    stored = ((blocks >> shifts) & (2**bits - 1)).view(len(packed), -1)[:, :inputs].to(torch.int8)
    codes: torch.Tensor = stored * 2 - 1 if bits == 1 else stored - 1
    return codes


def _row_bytes(inputs: int, bits: int) -> int:
    return padded_inputs(inputs) * bits // 8
