"""The packed embedding on a GPU: rows are unpacked from the bytes of the file as they are looked up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.packing import packed_bytes

_CHUNK = 256


@triton.jit
def _embedding_kernel(
    tokens: tl.tensor,
    packed: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    size: tl.tensor,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < columns
    row = tl.load(tokens + place).to(tl.int64)
    code_number = row * columns + column
    if BITS == 2:
        digit = (code_number % 5).to(tl.int32)
        value = tl.load(packed + code_number // 5, mask=inside, other=0).to(tl.int32)
        for position in tl.static_range(4):
            value = tl.where(position < digit, value // 3, value)
        code = value % 3 - 1
    else:
        bit = code_number * BITS
        byte = bit // 8
        value = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 3:
            value |= tl.load(packed + byte + 1, mask=inside & (byte + 1 < size), other=0).to(tl.int32) << 8
        stored = (value >> (bit % 8).to(tl.int32)) & (2**BITS - 1)
        code = stored * 2 - 1 if BITS == 1 else stored - 2 ** (BITS - 1)
    value = code.to(tl.float32) * tl.load(scale + row).to(tl.float32)
    if y.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(y + place * columns + column, value.to(y.dtype.element_ty), mask=inside)


def packed_embedding(
    tokens: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Implement ``fiftyfold::packed_embedding``, see :mod:`fiftyfold.kernels.operators`.

    A number that is not that of a row stops the GPU with an assertion, as torch's own embedding does. The bytes are not
    looked at, which would take waiting for the GPU: :func:`fiftyfold.kernels.packing.check_packed` does it, once.

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
        FiftyfoldError: if the bytes are not those of so many rows and columns.
    """
    rows = scale.numel()
    if scale.shape != (rows, 1) or packed.dtype != torch.uint8 or packed.shape != (packed_bytes(rows * columns, bits),):
        raise FiftyfoldError(
            f"{packed.dtype} codes of shape {tuple(packed.shape)} and scales of shape {tuple(scale.shape)} do not fit "
            f"an embedding of {columns} columns with {bits} bits."
        )
    y = packed.new_empty((*tokens.shape, columns), dtype=dtype)
    if y.numel():
        torch._assert_async(((tokens >= 0) & (tokens < rows)).all())
        grid = (tokens.numel(), triton.cdiv(columns, _CHUNK))
        with torch.cuda.device_of(packed):
            _embedding_kernel[grid](
                tokens.contiguous(), packed.contiguous(), scale.contiguous(), y, columns, packed.numel(), BITS=bits,
                CHUNK=_CHUNK, num_warps=2,
            )  # fmt: skip
    return y
