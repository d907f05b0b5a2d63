"""The packed linear layer on a GPU: int8 products with weights that stay packed until they are in registers.

A few tokens are multiplied by :mod:`fiftyfold.kernels.triton.tokens`; for more, int8 tensor cores do it, with the
weights as the left operand, because that one may come from registers. Where the tokens cannot fill a GPU, the inputs
are split among programs that write their int32 sums aside; integers add up to the same in any order, so every split
gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.linear import check_linear, integer_linear
from fiftyfold.kernels.triton.activations import QuantizedTokens, quantize_tokens
from fiftyfold.kernels.triton.early_start import early_options, gdc_launch_dependents, gdc_wait
from fiftyfold.kernels.triton.planes import BLOCK, arranged_planes, from_planes
from fiftyfold.kernels.triton.sums import rescaled
from fiftyfold.kernels.triton.tokens import MOST_TOKENS, multiply_tokens

_BLOCK = tl.constexpr(BLOCK)


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
    BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Multiply a tile of tokens on tensor cores, ``BLOCKS`` blocks of inputs at once."""
    BYTES: tl.constexpr = _BLOCK * BITS // 8
    part = tl.program_id(2)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    byte = tl.arange(0, BYTES * BLOCKS)
    inside = output < outputs
    present = token < tokens
    MASK: tl.constexpr = 1 if BITS == 1 else 3
    rows = output.to(tl.int64) * blocks
    lines = token.to(tl.int64) * blocks * _BLOCK
    total = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for block in range(part * BLOCKS, blocks, SPLIT * BLOCKS):
        there = byte < (blocks - block) * BYTES
        place = (rows[:, None] + block) * BYTES + byte[None, :]
        weights = tl.load(packed + place, mask=inside[:, None] & there[None, :], other=0)
        for plane in tl.static_range(8 // BITS):
            column = (block + byte // BYTES) * _BLOCK + plane * BYTES + byte % BYTES
            values = tl.load(codes + lines[:, None] + column[None, :], mask=present[:, None] & there[None, :], other=0)
            stored = ((weights >> (BITS * plane)) & MASK).to(tl.int8)
            total = tl.dot(stored, tl.trans(values), total, out_dtype=tl.int32)
    mask = inside[:, None] & present[None, :]
    if SPLIT > 1:
        tl.store(partial + (part * tokens + token[None, :]) * outputs + output[:, None], total, mask=mask)
    else:
        factor = tl.load(weight_scale + output, mask=inside, other=0.0)
        shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[:, None] if HAS_BIAS else 0.0
        token_sum = tl.load(sums + token, mask=present, other=0)
        scale = tl.load(scales + token, mask=present, other=0.0)
        result = rescaled(total, token_sum[None, :], scale[None, :], factor[:, None], shift, BITS, HAS_BIAS)
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
    EARLY: tl.constexpr,
) -> None:
    """Add up what the splits wrote aside, and rescale."""
    token = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    total = tl.zeros((OUTPUTS,), tl.int32)
    if EARLY:
        gdc_wait()
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + (part * tokens + token) * outputs + output, mask=inside, other=0)
    factor = tl.load(weight_scale + output, mask=inside, other=0.0)
    shift = tl.load(bias + output, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    result = rescaled(total, tl.load(sums + token), tl.load(scales + token), factor, shift, BITS, HAS_BIAS)
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
        weight: what :func:`~fiftyfold.kernels.triton.planes.arrange_planes` returned.
        scale: float32, (1, outputs), contiguous.
        bias: (outputs,) or none.
        bits: 1 (binary) or 2 (ternary).
        activation_bits: of the input's symmetric grid; 16 are multiplied by torch's own operations.
        full_range: whether that grid is XTC's, with one more negative code.
        clip: clamp the input to ``[-clip, clip]`` first.
        largest: the largest magnitude of a static range, a float32 scalar; by default each token's own.

    Returns:
        (…, outputs), of the type of ``x``.

    Raises:
        FiftyfoldError: if the shapes do not fit, or the weight was not arranged for them.
    """
    outputs, inputs = scale.shape[-1], x.shape[-1] if x.dim() else 0
    check_linear(x, (outputs, inputs), scale, activation_bits)
    planes = arranged_planes(weight, outputs, inputs, bits)
    _check_factors(scale, bias, largest)
    rows = x.reshape(-1, inputs)
    if activation_bits > 8:  # codes that int8 does not hold
        codes = from_planes(planes, bits, inputs)
        return integer_linear(x, codes, scale, bias, bits=activation_bits, clip=clip, largest=largest)
    bias = None if bias is None else bias.contiguous()
    multiply = multiply_tokens if len(rows) <= MOST_TOKENS else multiply_planes
    with torch.cuda.device_of(x):
        quantized = quantize_tokens(rows, bits=activation_bits, full_range=full_range, clip=clip, largest=largest)
        y = multiply(quantized, planes, scale, bias, weight_bits=bits, dtype=x.dtype)
    return y.view(*x.shape[:-1], outputs)


def _check_factors(scale: torch.Tensor, bias: torch.Tensor | None, largest: torch.Tensor | None) -> None:
    """Refuse what a kernel would read beyond its end, or as other numbers."""
    outputs = scale.shape[1]
    if len(scale) != 1 or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise FiftyfoldError(
            f"a weight in planes takes contiguous float32 scales of shape (1, {outputs}), not {scale.dtype} ones of "
            f"shape {tuple(scale.shape)}; use arrange_weight."
        )
    if bias is not None and bias.shape != (outputs,):
        raise FiftyfoldError(f"the bias has shape {tuple(bias.shape)}, but the layer has {outputs} outputs.")
    if largest is not None and largest.numel() != 1:
        raise FiftyfoldError(f"the largest magnitude must be one number, not {largest.numel()}.")


@dataclass(frozen=True)
class Plan:
    """How a product is shared out.

    Attributes:
        tokens: that a program computes.
        outputs: that a program computes.
        blocks: of inputs that a program reads at once.
        split: among how many programs the inputs of an output are split.
    """

    tokens: int
    outputs: int
    blocks: int
    split: int


def multiply_planes(
    quantized: QuantizedTokens,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_bits: int,
    dtype: torch.dtype = torch.float32,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Multiply quantized tokens by packed weights.

    Args:
        quantized: what :func:`quantize_tokens` returned.
        packed: what :func:`~fiftyfold.kernels.triton.planes.to_planes` returned.
        weight_scale: float32, (1, outputs), contiguous.
        bias: (outputs,) or none.
        weight_bits: 1 (binary) or 2 (ternary).
        dtype: type of the result.
        plan: chosen by the sizes if left out.

    Returns:
        (tokens, outputs).
    """
    codes, scales, sums = quantized
    tokens, outputs = len(codes), len(packed)
    y = codes.new_empty((tokens, outputs), dtype=dtype)
    if not tokens or not outputs:
        return y
    blocks = codes.shape[1] // BLOCK
    plan = plan or choose_plan(tokens, outputs, blocks, _processors(codes.device))
    partial = codes.new_empty((plan.split, tokens, outputs), dtype=torch.int32) if plan.split > 1 else y
    shared = {"BITS": weight_bits, "HAS_BIAS": bias is not None, "SPLIT": plan.split, "enable_fp_fusion": False}
    shared |= early_options(codes.device)
    factors = (scales, sums, weight_scale, y if bias is None else bias)
    sizes = (tokens, outputs)
    _matrix_kernel[(triton.cdiv(outputs, plan.outputs), triton.cdiv(tokens, plan.tokens), plan.split)](
        codes, packed, *factors, y, partial, *sizes, blocks, TOKENS=plan.tokens, OUTPUTS=plan.outputs,
        BLOCKS=plan.blocks, num_warps=4, num_stages=3, **shared,
    )  # fmt: skip
    if plan.split > 1:
        _finish_kernel[(triton.cdiv(outputs, 256), tokens)](partial, *factors, y, *sizes, OUTPUTS=256, **shared)
    return y


def choose_plan(tokens: int, outputs: int, blocks: int, processors: int) -> Plan:
    """Return how to share out a product: in tiles that fill a GPU, the inputs split where there are too few."""
    tile_tokens = next((size for size in (16, 32, 64) if tokens <= size), 128)
    tile_outputs = 64 if tokens <= 512 else 128
    at_once = 2 if tokens <= 64 else 1
    programs = triton.cdiv(outputs, tile_outputs) * triton.cdiv(tokens, tile_tokens)
    return Plan(tile_tokens, tile_outputs, at_once, _split(programs, triton.cdiv(blocks, at_once), processors))


def _split(programs: int, reads: int, processors: int) -> int:
    """Return among how many programs to split the inputs: as many as fill the GPU twice, in powers of two."""
    split = 1
    while split * 2 <= reads and programs * split < 2 * processors and split < 16:
        split *= 2
    return split


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
