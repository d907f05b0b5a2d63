"""The packed linear layer for a few tokens on a GPU: one kernel from floating-point input to floating-point output.

One token's time is that of reading the weights, and of starting kernels. So each program quantizes the token again for
itself, which takes less time than a kernel of its own; and it asks for its weights first, that they are on their way
meanwhile. ``dp4a`` multiplies four bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fiftyfold.kernels.triton.activations import clamped, code_bits, grid_arguments, token_scale
from fiftyfold.kernels.triton.planes import BLOCK, block_bytes
from fiftyfold.kernels.triton.sums import dot4, rescaled

WORDS = 4096
"""Words of four bytes of weights that a program asks for at once."""

FEWEST_OUTPUTS = 4
"""Of a program."""

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _weights(
    packed: tl.tensor,
    output: tl.tensor,
    outputs: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Return the words of ``BLOCKS`` blocks of every output, from ``block`` on; zeros where there are none."""
    word = block * (8 * BITS) + tl.arange(0, 8 * BITS * BLOCKS)
    place = output[:, None].to(tl.int64) * blocks * (8 * BITS) + word[None, :]
    return tl.load(packed + place, mask=(output < outputs)[:, None] & (word < blocks * (8 * BITS))[None, :], other=0)


@triton.jit
def _tokens_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    largest: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    blocks: tl.tensor,
    divisor: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    clip: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    STATIC: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Quantize and multiply one token by ``OUTPUTS`` rows of weights."""
    MASK: tl.constexpr = 0x01010101 if BITS == 1 else 0x03030303
    WORDS: tl.constexpr = 8 * BITS * BLOCKS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.program_id(1).to(tl.int64)
    x += token * columns
    weights = _weights(packed, output, outputs, 0, blocks, BITS, BLOCKS)
    scale = token_scale(x, columns, divisor, clip, largest, HAS_CLIP, STATIC, CHUNK)
    word = tl.arange(0, WORDS)
    byte = tl.arange(0, 4)
    total = tl.zeros((OUTPUTS, WORDS), tl.int32)
    code_sum = tl.zeros((WORDS,), tl.int32)
    strange = tl.zeros((WORDS,), tl.int32)
    ones = tl.full((WORDS,), 0x01010101, tl.int32)
    for block in range(0, blocks, BLOCKS):
        following = _weights(packed, output, outputs, block + BLOCKS, blocks, BITS, BLOCKS)
        for plane in tl.static_range(8 // BITS):
            first = (block + word // (8 * BITS)) * _BLOCK + plane * (32 * BITS) + word % (8 * BITS) * 4
            column = first[:, None] + byte[None, :]
            values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            values = clamped(values, clip, HAS_CLIP)
            if STATIC:
                strange |= tl.max((values != values).to(tl.int32), 1)
            codes = tl.sum((code_bits(values, scale, lowest, highest) & 255) << (8 * byte)[None, :], 1)
            code_sum = dot4(ones, codes, code_sum)
            stored = (weights >> (BITS * plane)) & MASK
            total = dot4(stored, tl.broadcast_to(codes[None, :], (OUTPUTS, WORDS)), total)
        weights = following
    if STATIC:
        # A scale that is not a number makes every output of the token so.
        scale = tl.where(tl.max(strange, 0) > 0, float("nan"), scale)
    inside = output < outputs
    factor = tl.load(weight_scale + output, mask=inside, other=0.0)
    shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    result = rescaled(tl.sum(total, 1), tl.sum(code_sum, 0), scale, factor, shift, BITS, HAS_BIAS)
    tl.store(y + token * outputs + output, result.to(y.dtype.element_ty), mask=inside)


def multiply_tokens(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_bits: int,
    bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize tokens and multiply them by packed weights, which are read once for each token.

    Args:
        x: (tokens, inputs), any floating-point type.
        packed: what :func:`~fiftyfold.kernels.triton.planes.to_planes` returned.
        weight_scale: float32, (1, outputs), contiguous.
        bias: (outputs,) or none.
        weight_bits: 1 (binary) or 2 (ternary).
        bits: of the grid, and the others, see :func:`~fiftyfold.kernels.triton.activations.quantize_tokens`.
        full_range: see there.
        clip: see there.
        largest: see there.

    Returns:
        (tokens, outputs), of the type of ``x``.
    """
    x = x.contiguous()
    tokens, outputs = len(x), len(packed)
    y = x.new_empty((tokens, outputs))
    if y.numel():
        blocks = packed.shape[1] // block_bytes(weight_bits)
        blocks_at_once = min(triton.next_power_of_2(blocks), WORDS // FEWEST_OUTPUTS // (8 * weight_bits))
        rows = WORDS // (8 * weight_bits) // blocks_at_once
        grid = grid_arguments(x, bits, full_range, clip, largest)
        _tokens_kernel[(triton.cdiv(outputs, rows), tokens)](
            x, packed.view(torch.int32), weight_scale, y if bias is None else bias, y, grid.pop("largest"),
            x.shape[1], outputs, blocks, BITS=weight_bits, HAS_BIAS=bias is not None, OUTPUTS=rows,
            BLOCKS=blocks_at_once, num_warps=4, **grid,
        )  # fmt: skip
    return y
