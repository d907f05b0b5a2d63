"""Packing the codes of quantized weights into bytes, and back.

The codes of a tensor are packed flat, in row-major order, in *units*: the fewest codes that fill whole bytes.

====  ======================  =====================  =============================================
bits  codes                   unit                   layout
====  ======================  =====================  =============================================
1     -1, +1                  8 codes in 1 byte      one bit each (+1 is set), lowest bit first
2     -1, 0, +1               5 codes in 1 byte      base 3 of ``code + 1``, lowest digit first
3     -3 … 3                  8 codes in 3 bytes     ``code + 4``, lowest bits of a little-endian word first
4     -7 … 7                  2 codes in 1 byte      ``code + 8``, lower half first
8     -127 … 127              1 code in 1 byte       ``code + 128``
====  ======================  =====================  =============================================

The last unit is filled up with the code that is stored as 0 (the lowest one), so that packing is deterministic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fiftyfold.errors import FiftyfoldError

_UNITS = {1: (8, 1), 2: (5, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
_TERNARY_BYTES = 3**5


def largest_code(bits: int) -> int:
    """Return the largest code of a weight with ``bits`` bits; codes run from its negative to it."""
    return 1 if bits <= 2 else 2 ** (bits - 1) - 1


def packed_bytes(numel: int, bits: int) -> int:
    """Return how many bytes ``numel`` codes take.

    Raises:
        FiftyfoldError: if there is no packing for ``bits``.
    """
    codes, size = _unit(bits)
    return math.ceil(numel / codes) * size


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes.

    Args:
        codes: int8, any shape.
        bits: 1, 2 (ternary), 3, 4 or 8.

    Returns:
        uint8, one-dimensional, with ``packed_bytes(codes.numel(), bits)`` entries.

    Raises:
        FiftyfoldError: if a code is not one of those that ``bits`` allows.
    """
    per_unit, size = _unit(bits)
    if codes.dtype != torch.int8:
        raise FiftyfoldError(f"codes to pack must be int8, not {codes.dtype}.")
    _check_codes(codes, bits)
    digits = _digits(codes.reshape(-1), bits)
    padding = -digits.numel() % per_unit
    if padding:
        digits = torch.cat([digits, digits.new_zeros(padding)])
    units = digits.view(-1, per_unit)
    if bits == 8:
        return units.reshape(-1)
    base = 3 if bits == 2 else 2**bits
    words = torch.zeros(len(units), dtype=torch.int32, device=codes.device)
    for position in range(per_unit):
        words += units[:, position].to(torch.int32) * base**position
    return torch.stack([(words >> 8 * byte) & 255 for byte in range(size)], dim=1).to(torch.uint8).view(-1)


def unpack_codes(packed: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    """Read what :func:`pack_codes` wrote.

    Args:
        packed: uint8, one-dimensional.
        bits: as it was packed.
        numel: how many codes there are.

    Returns:
        int8, one-dimensional, ``numel`` entries.

    Raises:
        FiftyfoldError: if the length does not fit, or a byte is one that packing never writes.
    """
    _check_bytes(packed, bits)
    if packed.numel() != packed_bytes(numel, bits):
        raise FiftyfoldError(
            f"{numel} codes of {bits} bit take {packed_bytes(numel, bits)} bytes, but there are {packed.numel()}; "
            "the file is truncated or was altered."
        )
    codes = _unpack_units(packed, bits).view(-1)[:numel]
    _check_codes(codes, bits)
    return codes


def unpack_rows(packed: torch.Tensor, bits: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack only some rows of a packed matrix, as an embedding looks them up.

    Args:
        packed: uint8, one-dimensional: a matrix with ``width`` columns, packed flat.
        bits: as it was packed.
        rows: integer row numbers, any shape.
        width: number of columns.

    Returns:
        int8, the shape of ``rows`` with ``width`` appended.

    Raises:
        IndexError: if a row number is outside the matrix.
        FiftyfoldError: if a byte is one that packing never writes.
    """
    _check_bytes(packed, bits)
    per_unit, size = _unit(bits)
    flat = rows.reshape(-1).to(torch.int64)
    units = packed.numel() // size
    if flat.numel() and (int(flat.min()) < 0 or (int(flat.max()) + 1) * width > units * per_unit):
        raise IndexError(f"row numbers must be between 0 and {units * per_unit // width - 1}.")
    first = flat * width
    offset = first % per_unit
    # A row may begin inside a unit, and then reaches into one unit more than its length asks for.
    spanned = math.ceil(width / per_unit) + (width % per_unit != 0)
    wanted = (first // per_unit).unsqueeze(1) + torch.arange(spanned, device=packed.device)
    gathered = packed.view(units, size)[wanted.clamp_(max=max(units - 1, 0))]
    codes = _unpack_units(gathered.view(-1), bits).view(len(flat), spanned * per_unit)
    if width % per_unit:
        codes = codes.gather(1, offset.unsqueeze(1) + torch.arange(width, device=packed.device))
    return codes.view(*rows.shape, width)


def check_packed(packed: torch.Tensor, bits: int) -> None:
    """Refuse what :func:`pack_codes` never returns, without unpacking it.

    Raises:
        FiftyfoldError: if it is no row of bytes in whole units, or a byte of ternary codes stands for none.
    """
    _check_bytes(packed, bits)
    if bits == 2:
        _check_ternary(packed)


def _unit(bits: int) -> tuple[int, int]:
    if bits not in _UNITS:
        raise FiftyfoldError(f"codes of {bits!r} bits cannot be packed; choose one of {_listed(tuple(_UNITS))}.")
    return _UNITS[bits]


def _digits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes as the uint8 digits that are stored."""
    if bits == 1:
        return (codes > 0).view(torch.uint8)
    return (codes.view(torch.uint8) + _zero_digit(bits)).contiguous()


def _zero_digit(bits: int) -> int:
    return 1 if bits == 2 else 2 ** (bits - 1)


def _unpack_units(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int8 codes, a unit per row."""
    if bits == 8:
        return (packed ^ 128).view(torch.int8).unsqueeze(1)
    if bits == 3:
        word = packed.view(-1, 3).to(torch.int32)
        word = word[:, 0] | word[:, 1] << 8 | word[:, 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=packed.device)
        return ((word.unsqueeze(1) >> shifts) & 7).sub_(4).to(torch.int8)
    if bits == 2:
        _check_ternary(packed)
    return _table(bits).to(packed.device).index_select(0, packed.to(torch.int32))


@functools.cache
def _table(bits: int) -> torch.Tensor:
    """Return the codes in each possible byte, int8 with shape (256, codes in a byte)."""
    per_unit, _ = _UNITS[bits]
    base = 3 if bits == 2 else 2**bits
    digits = torch.arange(256, device="cpu").unsqueeze(1) // base ** torch.arange(per_unit, device="cpu") % base
    codes = digits * 2 - 1 if bits == 1 else digits - _zero_digit(bits)
    return codes.to(torch.int8)


def _check_bytes(packed: torch.Tensor, bits: int) -> None:
    _, size = _unit(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FiftyfoldError(
            f"packed codes must be a one-dimensional uint8 tensor, not {packed.dtype} of shape {tuple(packed.shape)}."
        )
    if packed.numel() % size:
        raise FiftyfoldError(f"packed codes of {bits} bit come in groups of {size} bytes; the file is truncated.")


def _check_ternary(packed: torch.Tensor) -> None:
    if packed.numel() and int(packed.max()) >= _TERNARY_BYTES:
        raise FiftyfoldError(
            f"a byte of packed ternary codes is {int(packed.max())}, above {_TERNARY_BYTES - 1}; the file was altered."
        )


def _check_codes(codes: torch.Tensor, bits: int) -> None:
    if not codes.numel():
        return
    largest = largest_code(bits)
    low, high = (int(bound) for bound in codes.aminmax())
    if low < -largest or high > largest or (bits == 1 and bool((codes == 0).any())):
        allowed = "-1 and 1" if bits == 1 else f"{-largest} to {largest}"
        raise FiftyfoldError(f"codes of {bits} bit must be {allowed}, but there are some from {low} to {high}.")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
