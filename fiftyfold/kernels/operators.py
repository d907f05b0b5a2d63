"""The operators ``fiftyfold::packed_linear`` and ``fiftyfold::packed_embedding``, for every device.

They are opaque to ``torch.compile`` and ``torch.export``, with shape functions, and for inference: they have no
gradients. A device without a backend (see :mod:`fiftyfold.kernels.backends`) computes them by torch's own operations.

A weight comes in one of two *arrangements*, made once by :func:`arrange_weight`:

* ``int8`` (outputs, inputs): the codes themselves, which any device multiplies by torch's own operations;
* ``uint8``, one-dimensional: bytes that the backend of the weight's device alone understands.
"""

# An operator's implementations take all that its schema lists, by position.
# ruff: noqa: PLR0917, ARG001

from __future__ import annotations

import torch

import fiftyfold.kernels.cpu  # noqa: F401 - registers its backend
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.backends import LIBRARY, PACKED_BITS, backend_for
from fiftyfold.kernels.linear import check_numbers, integer_linear
from fiftyfold.kernels.packing import unpack_rows

LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, int activation_bits=8, "
    "bool full_range=False, float? clip=None, Tensor? largest=None) -> Tensor"
)
_EMBEDDING = "(Tensor tokens, Tensor packed, Tensor scale, int bits, int columns, ScalarType dtype) -> Tensor"
LIBRARY.define("packed_embedding" + _EMBEDDING)
LIBRARY.define("unpacked_embedding" + _EMBEDDING)
_LINEAR = torch.ops.fiftyfold.packed_linear.default  # finding it takes 0.3 of the 5 µs that a small call takes

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of inputs and outputs that backends know."""


def arrange_weight(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight as :func:`packed_linear` reads it on the device that it is on.

    Args:
        codes: int8, (outputs, inputs).
        scale: (1, 1), (outputs, 1) or (outputs, groups), float16 or float32.
        bits: of the codes.

    Returns:
        The weight, in one of the arrangements above, and its scales: float32, (groups, outputs).

    Raises:
        FiftyfoldError: if the shapes do not fit.
    """
    outputs, inputs = codes.shape
    groups = scale.shape[1]
    if scale.shape[0] not in (1, outputs) or not groups or inputs % groups:
        raise FiftyfoldError(f"scales of shape {tuple(scale.shape)} do not fit a weight of {outputs} x {inputs}.")
    backend = backend_for(codes.device.type) if bits in PACKED_BITS else None
    weight = codes if backend is None else backend.arrange(codes, bits, groups)
    return weight, scale.float().expand(outputs, groups).t().contiguous()


def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    activation_bits: int = 8,
    full_range: bool = False,
    clip: float | None = None,
    largest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize the input, multiply it as integers with a packed weight, rescale, and add the bias.

    ``(sum * input_scale) * weight_scale + bias`` in float32, in this order, so that every backend gives the same bits.
    With groups, the products of scales and sums are added in their order. A token with an entry that is not a number,
    or whose range is not finite, gives NaN in all outputs.

    Args:
        x: (…, inputs), float32, bfloat16 or float16.
        weight: as :func:`arrange_weight` returned it.
        scale: float32, (groups, outputs).
        bias: (outputs,) or none.
        bits: of the weight.
        activation_bits: of the input's symmetric grid.
        full_range: whether that grid is XTC's, with one more negative code.
        clip: clamp the input to ``[-clip, clip]`` first.
        largest: the largest magnitude of a static range, a float32 scalar; by default each token's own.

    Returns:
        (…, outputs), of the type of ``x``.

    Raises:
        FiftyfoldError: if the input is not of a floating-point type, or not dense, or does not fit the weight; the
            library of the CPU raises a RuntimeError for what does not fit.
    """
    if weight.dtype == torch.int8:  # torch's own operations, which a compiler sees through
        return integer_linear(
            x, weight, scale, bias, bits=activation_bits, full_range=full_range, clip=clip, largest=largest
        )
    dtype = x.dtype
    if dtype not in FLOAT_TYPES:
        check_numbers(x)
        x, bias = x.float(), None if bias is None else bias.float()
    result: torch.Tensor = _LINEAR(x, weight, scale, bias, bits, activation_bits, full_range, clip, largest)
    return result if result.dtype == dtype else result.to(dtype)


def packed_embedding(
    tokens: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Look up rows of a packed matrix.

    Args:
        tokens: row numbers, any shape, int32 or int64.
        packed: uint8, one-dimensional: the matrix as it is stored, see :mod:`fiftyfold.kernels.packing`.
        scale: float16, (rows, 1).
        bits: of the codes.
        columns: of the matrix.
        dtype: of the result.

    Returns:
        (…, columns).

    Raises:
        IndexError: if a number is not that of a row.
        RuntimeError: from the library of the CPU, if a row has bytes that packing never writes; a FiftyfoldError from
            torch's own operations. The kernels of a GPU, which would have to be waited for, read some code or other
            from such a byte. :func:`fiftyfold.kernels.packing.check_packed` tells before.
    """
    operator = torch.ops.fiftyfold.unpacked_embedding
    if bits in PACKED_BITS and dtype in FLOAT_TYPES:
        if not torch.compiler.is_compiling():
            backend_for(packed.device.type)
        operator = torch.ops.fiftyfold.packed_embedding
    result: torch.Tensor = operator.default(tokens, packed, scale, bits, columns, dtype)
    return result


def _linear(
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
    check_numbers(x)  # of a sparse one no backend takes a call
    if weight.dtype != torch.int8:
        # A program that was exported elsewhere brings arranged weights before anything asked for the backend.
        if not _implemented_on(x.device.type) and backend_for(x.device.type) and _implemented_on(x.device.type):
            return packed_linear(
                x,
                weight,
                scale,
                bias,
                bits=bits,
                activation_bits=activation_bits,
                full_range=full_range,
                clip=clip,
                largest=largest,
            )
        raise FiftyfoldError(
            f"a weight of {bits} bit that was arranged elsewhere cannot be multiplied on {x.device.type}; "
            "arrange it again from its codes."
        )
    return integer_linear(
        x, weight, scale, bias, bits=activation_bits, full_range=full_range, clip=clip, largest=largest
    )


def _implemented_on(device_type: str) -> bool:
    key = device_type.upper()
    has: bool = torch._C._dispatch_has_kernel_for_dispatch_key("fiftyfold::packed_linear", key)
    return has


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[1]))


def _embedding(
    tokens: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    values = unpack_rows(packed, bits, tokens, columns).to(torch.float32).mul_(scale.float()[tokens])
    if dtype == torch.float16:  # the largest value may exceed it by the rounding of the scale
        largest = torch.finfo(dtype).max
        values.clamp_(-largest, largest)
    return values.to(dtype)


def _embedding_shape(
    tokens: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    return packed.new_empty((*tokens.shape, columns), dtype=dtype)


LIBRARY.impl("packed_linear", _linear, "CompositeExplicitAutograd")
for _name in ("packed_embedding", "unpacked_embedding"):
    LIBRARY.impl(_name, _embedding, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fiftyfold::{_name}", _embedding_shape, lib=LIBRARY)
torch.library.register_fake("fiftyfold::packed_linear", _linear_shape, lib=LIBRARY)
