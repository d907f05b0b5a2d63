"""The packed linear layer on a GPU: int8 products with weights that stay packed until they are in registers.

For one token, ``dp4a`` multiplies four bytes at a time; for more, int8 tensor cores do, with the weights as the left
operand, because that one may come from registers. Few tokens cannot fill a GPU, so the inputs are split among programs
that write their int32 sums aside; integers add up to the same in any order, so every split gives the same bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fiftyfold.kernels.linear import integer_linear
from fiftyfold.kernels.triton.activations import quantize_tokens
from fiftyfold.kernels.triton.planes import BLOCK, block_bytes, from_planes

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which has no inline assembly."""

VECTOR_OUTPUTS = 16
"""Outputs of a program that multiplies one token."""

_BLOCK = tl.constexpr(BLOCK)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot4(weights: tl.tensor, tokens: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Add the products of four unsigned and four signed bytes, packed into words, to ``total``."""
    if _INTERPRETED:
        for byte in tl.static_range(4):
            weight = (weights >> (8 * byte)) & 255
            total += weight * ((tokens << (24 - 8 * byte)) >> 24)
        return total
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, tokens, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _rescaled(
    total: tl.tensor,
    token_sum: tl.tensor,
    token_scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """Turn sums over stored weights, which are not negative, into outputs."""
    exact = total * (2 if BITS == 1 else 1) - token_sum
    output = exact.to(tl.float32) * token_scale * weight_scale
    if HAS_BIAS:
        output += bias
    return output


@triton.jit
def _vector_kernel(
    codes: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Multiply one token: codes and weights are read as words of four bytes."""
    part, token = tl.program_id(1), tl.program_id(2)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    word = tl.arange(0, WORDS)
    inside = output < outputs
    MASK: tl.constexpr = 0x01010101 if BITS == 1 else 0x03030303
    total = tl.zeros((OUTPUTS, WORDS), tl.int32)
    for block in range(part, blocks, SPLIT):
        place = (output[:, None].to(tl.int64) * blocks + block) * WORDS + word[None, :]
        weights = tl.load(packed + place, mask=inside[:, None], other=0)
        for plane in tl.static_range(8 // BITS):
            values = tl.load(codes + token * blocks * (_BLOCK // 4) + block * (_BLOCK // 4) + plane * WORDS + word)
            stored = (weights >> (BITS * plane)) & MASK
            total = _dot4(stored, tl.broadcast_to(values[None, :], (OUTPUTS, WORDS)), total)
    found = tl.sum(total, 1)
    if SPLIT > 1:
        tl.store(partial + (part * tokens + token) * outputs + output, found, mask=inside)
    else:
        factor = tl.load(weight_scale + output, mask=inside, other=0.0)
        shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        result = _rescaled(found, tl.load(sums + token), tl.load(scales + token), factor, shift, BITS, HAS_BIAS)
        tl.store(y + token * outputs + output, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_kernel(
    codes: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    blocks: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """Multiply a tile of tokens on tensor cores."""
    part = tl.program_id(2)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    byte = tl.arange(0, BYTES)
    inside = output < outputs
    present = token < tokens
    MASK: tl.constexpr = 1 if BITS == 1 else 3
    rows = output.to(tl.int64) * blocks
    lines = token.to(tl.int64) * blocks * _BLOCK
    total = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    for block in range(part, blocks, SPLIT):
        weights = tl.load(packed + (rows[:, None] + block) * BYTES + byte[None, :], mask=inside[:, None], other=0)
        for plane in tl.static_range(8 // BITS):
            place = lines[:, None] + block * _BLOCK + plane * BYTES + byte[None, :]
            values = tl.load(codes + place, mask=present[:, None], other=0)
            stored = ((weights >> (BITS * plane)) & MASK).to(tl.int8)
            total = tl.dot(stored, tl.trans(values), total)
    mask = inside[:, None] & present[None, :]
    if SPLIT > 1:
        tl.store(partial + (part * tokens + token[None, :]) * outputs + output[:, None], total, mask=mask)
    else:
        factor = tl.load(weight_scale + output, mask=inside, other=0.0)
        shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
        token_sum = tl.load(sums + token, mask=present, other=0)
        scale = tl.load(scales + token, mask=present, other=0.0)
        result = _rescaled(total, token_sum[None, :], scale[None, :], factor[:, None], shift, BITS, HAS_BIAS)
        place = token[None, :].to(tl.int64) * outputs + output[:, None]
        tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    partial: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """Add up what the splits wrote aside, and rescale."""
    token = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    total = tl.zeros((OUTPUTS,), tl.int32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + (part * tokens + token) * outputs + output, mask=inside, other=0)
    factor = tl.load(weight_scale + output, mask=inside, other=0.0)
    shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    result = _rescaled(total, tl.load(sums + token), tl.load(scales + token), factor, shift, BITS, HAS_BIAS)
    tl.store(y + token * outputs + output, result.to(y.dtype.element_ty), mask=inside)


def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    activation_bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Implement ``fiftyfold::packed_linear`` for weights in planes, see :mod:`fiftyfold.kernels.operators`.

    Args:
        x: (…, inputs), any floating-point type.
        weight: what :func:`~fiftyfold.kernels.triton.planes.to_planes` returned, flat.
        scale: float32, (1, outputs).
        bias: (outputs,) or none.
        bits: 1 (binary) or 2 (ternary).
        activation_bits: of the input's symmetric grid; 16 are multiplied by torch's own operations.
        full_range: whether that grid is XTC's, with one more negative code.
        clip: clamp the input to ``[-clip, clip]`` first.
        largest: the largest magnitude of a static range, a float32 scalar; by default each token's own.

    Returns:
        (…, outputs), of the type of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    planes = weight.view(scale.shape[1], -1)
    if activation_bits > 8:  # codes that int8 does not hold
        codes = from_planes(planes, bits, x.shape[-1])
        return integer_linear(x, codes, scale, bias, bits=activation_bits, clip=clip, largest=largest)
    with torch.cuda.device_of(x):
        quantized = quantize_tokens(rows, bits=activation_bits, full_range=full_range, clip=clip, largest=largest)
        y = multiply_planes(*quantized, planes, scale, bias, weight_bits=bits, dtype=x.dtype)
    return y.view(*x.shape[:-1], scale.shape[1])


def multiply_planes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_bits: int,
    dtype: torch.dtype = torch.float32,
    split: int | None = None,
) -> torch.Tensor:
    """Multiply quantized tokens by packed weights.

    Args:
        codes: with ``scales`` and ``sums``, what :func:`quantize_tokens` returned.
        scales: see there.
        sums: see there.
        packed: what :func:`~fiftyfold.kernels.triton.planes.to_planes` returned.
        weight_scale: float32, (1, outputs), contiguous.
        bias: (outputs,) or none.
        weight_bits: 1 (binary) or 2 (ternary).
        dtype: type of the result.
        split: among how many programs the inputs of an output are split; chosen by the sizes if left out.

    Returns:
        (tokens, outputs).
    """
    tokens, outputs = len(codes), len(packed)
    y = codes.new_empty((tokens, outputs), dtype=dtype)
    if not tokens or not outputs:
        return y
    blocks = codes.shape[1] // BLOCK
    tile_tokens, tile_outputs = _tile(tokens)
    programs = triton.cdiv(outputs, tile_outputs) * triton.cdiv(tokens, tile_tokens)
    split = min(blocks, _split(programs, blocks, _processors(codes.device))) if split is None else min(split, blocks)
    partial = codes.new_empty((split, tokens, outputs), dtype=torch.int32) if split > 1 else y
    shared = {"BITS": weight_bits, "HAS_BIAS": bias is not None}
    shared |= {"SPLIT": split, "enable_fp_fusion": False}
    factors = (scales, sums, weight_scale, y if bias is None else bias)
    sizes = (tokens, outputs)
    columns = triton.cdiv(outputs, tile_outputs)
    if tile_tokens == 1:
        words = (codes.view(torch.int32), packed.view(torch.int32))
        _vector_kernel[(columns, split, tokens)](
            *words, *factors, y, partial, *sizes, blocks, OUTPUTS=tile_outputs, WORDS=block_bytes(weight_bits) // 4,
            num_warps=4, **shared,
        )  # fmt: skip
    else:
        _matrix_kernel[(columns, triton.cdiv(tokens, tile_tokens), split)](
            codes, packed, *factors, y, partial, *sizes, blocks, TOKENS=tile_tokens, OUTPUTS=tile_outputs,
            BYTES=block_bytes(weight_bits), num_warps=8 if tile_tokens > 32 else 4, num_stages=3, **shared,
        )  # fmt: skip
    if split > 1:
        _finish_kernel[(triton.cdiv(outputs, 256), tokens)](partial, *factors, y, *sizes, OUTPUTS=256, **shared)
    return y


def _tile(tokens: int) -> tuple[int, int]:
    """Return how many tokens and outputs a program computes."""
    if tokens == 1:
        return 1, VECTOR_OUTPUTS
    if tokens <= 16:
        return 16, 64
    if tokens <= 32:
        return 32, 64
    return (64, 128) if tokens <= 64 else (128, 128)


def _split(programs: int, blocks: int, processors: int) -> int:
    """Return among how many programs to split the inputs: as many as fill the GPU twice, in powers of two."""
    split = 1
    while split * 2 <= blocks and programs * split < 2 * processors and split < 16:
        split *= 2
    return split


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
