"""From sums over stored weights to outputs: what the product kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot4(weights: tl.tensor, tokens: tl.tensor, total: tl.tensor) -> tl.tensor:
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
def rescaled(
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
