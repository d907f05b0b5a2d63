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

# The smallest matrices that CUDA's int8 product takes.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8


def largest_inputs(bits: int) -> int:
    """Return of how many inputs of ``bits`` bits the products can be summed below 2**31, whatever they are."""
    return 2**16 if bits == 16 else 2**17


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
    """Quantize the input per token, multiply integers, and rescale: ``(sum * input_scale) * weight_scale + bias``.

    A token with an entry that is not a number, or whose range is not finite, gives NaN in all outputs.

    Args:
        x: (…, inputs), any floating-point type.
        codes: int8, (outputs, inputs).
        weight_scale: (groups, outputs), float32: one scale per output for each of the equal parts of the inputs.
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
    _check(x, codes, weight_scale, bits)
    rows = x.reshape(-1, x.shape[-1]).float()
    if clip is not None:
        rows = rows.clamp(-clip, clip)
    input_codes, input_scale = _quantize_tokens(rows, bits, full_range, largest)
    groups = zip(input_codes.chunk(len(weight_scale), 1), codes.chunk(len(weight_scale), 1), weight_scale, strict=True)
    outputs = [_multiply(x, weight, bits).mul_(input_scale).mul_(scale) for x, weight, scale in groups]
    for part in outputs[1:]:
        outputs[0].add_(part)
    output = outputs[0]
    if bias is not None:
        output.add_(bias.float())
    return output.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def _quantize_tokens(
    rows: torch.Tensor, bits: int, full_range: bool, largest: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as integers in float32, and scales (rows, 1) that are NaN where a token has no meaningful codes."""
    if largest is None:
        largest = token_magnitudes(rows)
        codes = symmetric_codes(rows, scale := symmetric_scale(largest, bits, full_range), bits, full_range)
    else:
        largest = largest.float().expand(len(rows), 1)
        codes = symmetric_codes(rows, scale := symmetric_scale(largest, bits, full_range), bits, full_range)
        largest = largest + codes.sum(dim=1, keepdim=True)  # not a number if one of them is not
    return codes, scale.masked_fill(~largest.isfinite(), torch.nan)


def _multiply(x: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the sums of products as float32, rounded once.

    Args:
        x: integers in float32, (rows, inputs).
        codes: int8, (outputs, inputs).
        bits: of ``x``; 16 are taken in two passes.
    """
    if bits <= 8:
        return multiply_codes(x.to(torch.int8), codes)
    high = torch.floor((x + 128) / 256)
    low = (x - 256 * high).to(torch.int8)
    sums = multiply_codes(high.to(torch.int8), codes).double().mul_(256)
    return sums.add_(multiply_codes(low, codes)).float()


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


def _check(x: torch.Tensor, codes: torch.Tensor, weight_scale: torch.Tensor, bits: int) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise FiftyfoldError(f"weight codes must be an int8 matrix, not {codes.dtype} of shape {tuple(codes.shape)}.")
    outputs, inputs = codes.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise FiftyfoldError(f"the input has shape {tuple(x.shape)}, but the layer takes {inputs} features.")
    groups = weight_scale.shape[0] if weight_scale.dim() == 2 else 0
    if not groups or weight_scale.shape[1] != outputs or inputs % groups:
        raise FiftyfoldError(
            f"weight scales must have shape (groups, {outputs}), with groups that divide {inputs}, "
            f"not {tuple(weight_scale.shape)}."
        )
    if inputs > largest_inputs(bits):
        raise FiftyfoldError(f"{inputs} inputs are more than the {largest_inputs(bits)} whose products int32 can sum.")


@functools.cache
def _cpu_multiplies_exactly() -> bool:
    """Tell whether int8 products on this CPU cannot saturate.

    x86 without VNNI adds pairs of products in 16 bits, which is too few for 8-bit codes on both sides.
    """
    x86 = platform.machine().lower() in {"x86_64", "amd64", "i386", "i686", "x86"}
    return not x86 or bool(torch.cpu._is_vnni_supported())
