"""Rows of float32 times a weight of 1 or 2 bits, by tables, on CPUs: a layer's gradient on its way to its input.

A table holds what each combination of some neighbouring outputs' codes makes of a row's entries, so that one addition
takes the place of four products of a binary weight, or of three of a ternary one (the "method of four Russians":
Arlazarov, Dinic, Kronrod and Faradzev, 1970). The products that are summed are those of a float32 product; only the
order of the sum differs, and it is the same on all processors and for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from fiftyfold.kernels.cpu import cpu_status


def find_entries(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return which entries of the tables a weight's codes are, for :func:`multiply_rows`.

    Args:
        codes: int8, (outputs, inputs), on the CPU; :func:`.training.is_native` must hold where they come from.
        bits: 1 or 2.
    """
    outputs, inputs = codes.shape
    entries = torch.empty(table_functions().ff_entries_bytes(outputs, inputs, bits), dtype=torch.uint8, device="cpu")
    table_functions().ff_find_entries(codes.contiguous().data_ptr(), outputs, inputs, bits, entries.data_ptr())
    return entries


def multiply_rows(
    rows: torch.Tensor, entries: torch.Tensor, scale: torch.Tensor, bits: int, inputs: int
) -> torch.Tensor:
    """Return ``rows @ (codes * scale)``, float32 (tokens, inputs).

    Args:
        rows: float32, (tokens, outputs).
        entries: of the codes, from :func:`find_entries`.
        scale: float16, (outputs, 1) or (1, 1).
        bits: 1 or 2.
        inputs: of the weight.
    """
    rows, scale = rows.contiguous(), scale.contiguous()
    y = rows.new_empty((len(rows), inputs))
    per_tensor = int(len(scale) == 1)
    table_functions().ff_multiply_rows(
        rows.data_ptr(), *rows.shape, inputs, bits, entries.data_ptr(), scale.data_ptr(), per_tensor, y.data_ptr()
    )  # fmt: skip
    return y


@functools.cache
def table_functions() -> ctypes.CDLL:
    """Return the library with what it has for tables declared; there must be one."""
    status = cpu_status()
    assert status.library is not None
    library = status.library.functions
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ff_entries_bytes.argtypes = [count, count, number]
    library.ff_entries_bytes.restype = count
    library.ff_find_entries.argtypes = [pointer, count, count, number, pointer]
    library.ff_find_entries.restype = None
    library.ff_multiply_rows.argtypes = [pointer, count, count, count, number, pointer, pointer, number, pointer]
    library.ff_multiply_rows.restype = None
    library.ff_tabled_bytes.argtypes = [count, count, number]
    library.ff_tabled_bytes.restype = count
    library.ff_arrange_for_tables.argtypes = [pointer, count, count, number, pointer]
    library.ff_arrange_for_tables.restype = None
    return library
