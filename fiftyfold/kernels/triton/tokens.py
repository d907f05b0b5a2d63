"""The product of a few quantized tokens on a GPU, each with ``dp4a``, which multiplies four bytes at a time.

One token's time is that of reading the weights and of starting kernels. So a program asks for its weights before it
waits for the kernel that quantizes the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fiftyfold.kernels.triton.activations import QuantizedTokens
from fiftyfold.kernels.triton.early_start import early_options, gdc_wait
from fiftyfold.kernels.triton.planes import BLOCK, block_bytes
from fiftyfold.kernels.triton.sums import dot4, rescaled

MOST_TOKENS = 4
"""More are quicker on tensor cores."""

LARGEST_BLOCKS = 16
"""Of inputs that a program asks for at once."""

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
    codes: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    outputs: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Multiply one token by ``OUTPUTS`` rows of weights: codes and weights are words of four bytes."""
    MASK: tl.constexpr = 0x01010101 if BITS == 1 else 0x03030303
    WORDS: tl.constexpr = 8 * BITS * BLOCKS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.program_id(1).to(tl.int64)
    weights = _weights(packed, output, outputs, 0, blocks, BITS, BLOCKS)
    inside = output < outputs
    factor = tl.load(weight_scale + output, mask=inside, other=0.0)
    shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    codes += token * blocks * (_BLOCK // 4)
    word = tl.arange(0, WORDS)
    total = tl.zeros((OUTPUTS, WORDS), tl.int32)
    if EARLY:
        gdc_wait()
    for block in range(0, blocks, BLOCKS):
        following = _weights(packed, output, outputs, block + BLOCKS, blocks, BITS, BLOCKS)
        for plane in tl.static_range(8 // BITS):
            place = (block + word // (8 * BITS)) * (_BLOCK // 4) + plane * (8 * BITS) + word % (8 * BITS)
            values = tl.load(codes + place, mask=place < blocks * (_BLOCK // 4), other=0)
            stored = (weights >> (BITS * plane)) & MASK
            total = dot4(stored, tl.broadcast_to(values[None, :], (OUTPUTS, WORDS)), total)
        weights = following
    found, token_sum, scale = tl.sum(total, 1), tl.load(sums + token), tl.load(scales + token)
    result = rescaled(found, token_sum, scale, factor, shift, BITS, HAS_BIAS)
    tl.store(y + token * outputs + output, result.to(y.dtype.element_ty), mask=inside)


def multiply_tokens(
    quantized: QuantizedTokens,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply quantized tokens by packed weights, which are read once for each token.

    The arguments and the result are those of :func:`fiftyfold.kernels.triton.linear.multiply_planes`.
    """
    codes, scales, sums = quantized
    tokens, outputs = len(codes), len(packed)
    y = codes.new_empty((tokens, outputs), dtype=dtype)
    if y.numel():
        blocks = packed.shape[1] // block_bytes(weight_bits)
        rows = 16 // weight_bits
        _tokens_kernel[(triton.cdiv(outputs, rows), tokens)](
            codes.view(torch.int32), packed.view(torch.int32), scales, sums, weight_scale, y if bias is None else bias,
            y, outputs, blocks, BITS=weight_bits, HAS_BIAS=bias is not None, OUTPUTS=rows,
            BLOCKS=min(triton.next_power_of_2(blocks), LARGEST_BLOCKS), num_warps=4 // weight_bits,
            enable_fp_fusion=False, **early_options(codes.device),
        )  # fmt: skip
    return y
