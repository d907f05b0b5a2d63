"""A linear layer in integers: int8 inputs times int8 codes, summed in int32, rescaled once.

It computes what the fake-quantized layer computes. Both round the input to the same codes; only the sums differ: they
are exact here, and rounded in float32 there. So the outputs agree within the rounding of a float32 sum, about
``1e-6 * (|x| @ |W|ᵀ + |bias|)``.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.activations import symmetric_codes, symmetric_scale, token_magnitudes

# 128 * 127 * 2**17 is the largest sum that stays below 2**31.
LARGEST_INPUTS = 2**17

# The smallest matrices that CUDA's int8 product takes.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8


def integer_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize the input per token, multiply integers, and rescale.

    Args:
        x: (…, inputs), any floating-point type.
        codes: int8, (outputs, inputs).
        weight_scale: (1, 1) for one scale, or (outputs, 1); float16 or float32.
        bias: (outputs,) or none.
        bits: bits of the input's symmetric grid.
        full_range: whether that grid is XTC's, with one more negative code.
        clip: clamp the input to ``[-clip, clip]`` first.
        largest: the largest magnitude of a static range, a scalar; by default each token's own.

    Returns:
        (…, outputs), of the type of ``x``.

    Raises:
        FiftyfoldError: if the shapes do not fit, or the inputs are so many that int32 could overflow.
    """
    _check(x, codes, weight_scale)
    rows = x.reshape(-1, x.shape[-1]).float()
    if clip is not None:
        rows = rows.clamp(-clip, clip)
    scale = symmetric_scale(token_magnitudes(rows) if largest is None else largest.float(), bits, full_range)
    sums = multiply_codes(symmetric_codes(rows, scale, bits, full_range).to(torch.int8), codes)
    output = _rescale(sums, scale, weight_scale.float(), bias)
    return output.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def multiply_codes(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return ``x @ codes.T`` as float32; exact where the machine has a trustworthy int8 product.

    Elsewhere the codes are multiplied as float32 numbers, exact up to sums of 2**24 and rounded beyond.

    Args:
        x: int8, (rows, inputs).
        codes: int8, (outputs, inputs).
    """
    if not len(x):
        return torch.zeros(0, len(codes), device=x.device)
    # With one input, torch 2.13 misreads the strides on CPUs and gives wrong products.
    if x.device.type == "cpu" and x.shape[1] > 1 and _cpu_multiplies_exactly():
        return torch._int_mm(x, codes.t()).float()
    if x.device.type == "cuda" and not any(size % _CUDA_MULTIPLE for size in codes.shape):
        padded = F.pad(x, (0, 0, 0, max(0, _CUDA_ROWS - len(x))))
        return torch._int_mm(padded, codes.t())[: len(x)].float()
    return x.float() @ codes.t().float()


def _rescale(
    sums: torch.Tensor, scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if weight_scale.shape[0] == 1:
        scale = scale * weight_scale
    else:
        sums.mul_(weight_scale.view(1, -1))
    if bias is None:
        return sums.mul_(scale)
    return torch.addcmul(bias.float(), sums, scale, out=sums)


def _check(x: torch.Tensor, codes: torch.Tensor, weight_scale: torch.Tensor) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise FiftyfoldError(f"weight codes must be an int8 matrix, not {codes.dtype} of shape {tuple(codes.shape)}.")
    outputs, inputs = codes.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise FiftyfoldError(f"the input has shape {tuple(x.shape)}, but the layer takes {inputs} features.")
    if tuple(weight_scale.shape) not in {(1, 1), (outputs, 1)}:
        raise FiftyfoldError(
            f"weight scales must have shape (1, 1) or ({outputs}, 1), not {tuple(weight_scale.shape)}; "
            "scales per group have no integer path."
        )
    if inputs > LARGEST_INPUTS:
        raise FiftyfoldError(f"{inputs} inputs are more than the {LARGEST_INPUTS} whose products int32 can sum.")


@functools.cache
def _cpu_multiplies_exactly() -> bool:
    """Tell whether int8 products on this CPU cannot saturate.

    x86 without VNNI adds pairs of products in 16 bits, which is too few for 8-bit codes on both sides.
    """
    x86 = platform.machine().lower() in {"x86_64", "amd64", "i386", "i686", "x86"}
    return not x86 or bool(torch.cpu._is_vnni_supported())
