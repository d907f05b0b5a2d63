"""A linear layer in integers: int8 inputs times int8 codes, summed in int32, rescaled once.

It computes what the fake-quantized layer computes. Both round the input to the same codes; only the sums differ: they
are exact here, and rounded in float32 there. So the outputs agree within the rounding of a float32 sum, about
``1e-6 * (|x| @ |W|ᵀ + |bias|)``.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.activations import symmetric_codes, symmetric_scale, token_magnitudes

# The smallest matrices that CUDA's int8 product takes.
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8


Product = Callable[[torch.Tensor], torch.Tensor]
"""From inputs of at most 8 bits, as integers in float32 (rows, inputs), to their sums in float32 (rows, outputs)."""


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
    check_linear(x, codes.shape, weight_scale, bits)
    if codes.dtype != torch.int8:
        raise FiftyfoldError(f"weight codes must be int8, not {codes.dtype}.")
    products = [functools.partial(_multiply, part) for part in codes.chunk(len(weight_scale), 1)]
    return rescaled_products(
        x, products, weight_scale, bias, bits=bits, full_range=full_range, clip=clip, largest=largest
    )


def rescaled_products(
    x: torch.Tensor,
    products: Sequence[Product],
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    bits: int,
    full_range: bool,
    clip: float | None,
    largest: torch.Tensor | None,
) -> torch.Tensor:
    """Compute :func:`integer_linear` with the given products, one for each of the equal parts of the inputs."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if clip is not None:
        rows = rows.clamp(-clip, clip)
    input_codes, input_scale = _quantize_tokens(rows, bits, full_range, largest)
    groups = zip(input_codes.chunk(len(products), 1), products, weight_scale, strict=True)
    outputs = [_in_passes(product, part, bits).mul_(input_scale).mul_(scale) for part, product, scale in groups]
    for part in outputs[1:]:
        outputs[0].add_(part)
    output = outputs[0]
    if bias is not None:
        output.add_(bias.float())
    return output.to(x.dtype).view(*x.shape[:-1], weight_scale.shape[1])


def _quantize_tokens(
    rows: torch.Tensor, bits: int, full_range: bool, largest: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as integers in float32, and scales (rows, 1) that are NaN where a token has no meaningful codes."""
    if largest is None:
        largest = token_magnitudes(rows)
        codes = symmetric_codes(rows, scale := symmetric_scale(largest, bits, full_range), bits, full_range)
    else:
        largest = largest.float().expand(rows.shape[0], 1)
        codes = symmetric_codes(rows, scale := symmetric_scale(largest, bits, full_range), bits, full_range)
        largest = largest + codes.sum(dim=1, keepdim=True)  # not a number if one of them is not
    return codes, scale.masked_fill(~largest.isfinite(), torch.nan)


def _in_passes(product: Product, x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the sums of products as float32, rounded once; inputs of 16 bits are taken in two passes."""
    if bits <= 8:
        return product(x)
    high = torch.floor((x + 128) / 256)
    sums = product(high).double().mul_(256)
    return sums.add_(product(x - 256 * high)).float()


def _multiply(codes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return multiply_codes(x.to(torch.int8), codes)


def multiply_codes(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return ``x @ codes.T`` as float32; exact where the machine has a trustworthy int8 product.

    Elsewhere the codes are multiplied as float32 numbers, exact up to sums of 2**24 and rounded beyond.

    Args:
        x: int8, (rows, inputs).
        codes: int8, (outputs, inputs).
    """
    if not x.shape[0]:
        return x.new_empty((0, len(codes)), dtype=torch.float32)
    # With one input, torch 2.13 misreads the strides on CPUs and gives wrong products.
    if x.device.type == "cpu" and x.shape[1] > 1 and int8_product_is_exact():
        return torch._int_mm(x, codes.t()).float()
    if x.device.type == "cuda" and not any(size % _CUDA_MULTIPLE for size in codes.shape):
        padded = F.pad(x, (0, 0, 0, max(0, _CUDA_ROWS - x.shape[0])))
        return torch._int_mm(padded, codes.t())[: x.shape[0]].float()
    # Autocast would round the codes to its type; it leaves a product alone whose output is given.
    sums = x.new_empty((x.shape[0], codes.shape[0]), dtype=torch.float32)
    return torch.mm(x.float(), codes.t().float(), out=sums).add_(0.0)  # a sum of integers is never -0


def check_linear(x: torch.Tensor, shape: Sequence[int], weight_scale: torch.Tensor, bits: int) -> None:
    """Refuse an input that is none, or that does not fit a weight of ``shape``, (outputs, inputs), and such scales.

    Raises:
        FiftyfoldError: as :func:`integer_linear`.
    """
    if len(shape) != 2:
        raise FiftyfoldError(f"weight codes must be a matrix, not of shape {tuple(shape)}.")
    check_numbers(x)
    outputs, inputs = shape
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


def check_numbers(x: torch.Tensor) -> None:
    """Refuse an input whose outputs could not be of its type, or that has no entries to read.

    Raises:
        FiftyfoldError: if it is not of a floating-point type, or not dense.
    """
    if not x.is_floating_point():
        raise FiftyfoldError(
            f"the input is of type {x.dtype}, but a layer takes floating-point numbers; use x.float()."
        )
    if x.layout != torch.strided:
        raise FiftyfoldError(f"the input is laid out as {x.layout}, but a layer takes dense ones; use x.to_dense().")


# Asked when the module is imported, since torch.compile cannot trace the question.
_X86 = platform.machine().lower() in {"x86_64", "amd64", "i386", "i686", "x86"}
_INT8_PRODUCT_IS_EXACT = not _X86 or bool(torch.cpu._is_vnni_supported())


def int8_product_is_exact() -> bool:
    """Tell whether products of any int8 codes on this CPU cannot saturate.

    x86 without VNNI adds pairs of products in 16 bits, which is too few for 8-bit codes on both sides.
    """
    return _INT8_PRODUCT_IS_EXACT
