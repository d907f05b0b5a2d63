"""The operator ``fiftyfold::table_linear``: a layer of 1- or 2-bit weights whose inputs are floats, on CPUs.

Sums are those of a float32 product with the codes, in another order, which is the same for any number of rows and
threads; then they are rescaled. See :mod:`fiftyfold.kernels.table_product` for the tables.
"""

from __future__ import annotations

import functools

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.backends import LIBRARY, backend_for
from fiftyfold.kernels.cpu import cpu_status
from fiftyfold.kernels.linear import check_numbers
from fiftyfold.kernels.table_product import table_functions

LIBRARY.define("table_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits) -> Tensor")
_OPERATOR = torch.ops.fiftyfold.table_linear.default


@functools.cache
def has_tables() -> bool:
    """Tell whether this processor has the library that computes the operator; compile it where it is missing."""
    return backend_for("cpu") is not None and cpu_status().library is not None


def arrange_for_tables(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a weight as :func:`table_linear` reads it; :func:`has_tables` must hold.

    Args:
        codes: int8, (outputs, inputs), on the CPU.
        bits: 1 or 2.
    """
    outputs, inputs = codes.shape
    codes = codes.contiguous()
    weight = torch.empty(table_functions().ff_tabled_bytes(outputs, inputs, bits), dtype=torch.uint8, device="cpu")
    table_functions().ff_arrange_for_tables(codes.data_ptr(), outputs, inputs, bits, weight.data_ptr())
    return weight


def table_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, bits: int
) -> torch.Tensor:
    """Return ``(x @ codes.T) * scale + bias``, computed in float32.

    Args:
        x: (…, inputs), float32, bfloat16 or float16.
        weight: as :func:`arrange_for_tables` returned it.
        scale: float32, (outputs,).
        bias: (outputs,) or none.
        bits: of the codes.

    Returns:
        (…, outputs), of the type of ``x``.
    """
    result: torch.Tensor = _OPERATOR(x, weight, scale, bias, bits)
    return result


def _elsewhere(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Compute what an exported program brings before anything asked for the library."""
    check_numbers(x)
    key = "fiftyfold::table_linear", "CPU"
    known = torch._C._dispatch_has_kernel_for_dispatch_key(*key)
    if x.device.type == "cpu" and not known and has_tables():
        return table_linear(x, weight, scale, bias, bits=bits)
    raise FiftyfoldError(
        f"a weight of {bits} bit that was arranged for a CPU's tables cannot be multiplied on {x.device.type}; load "
        "the model anew."
    )


def _shape(x: torch.Tensor, _: torch.Tensor, scale: torch.Tensor, *__: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


LIBRARY.impl("table_linear", _elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("fiftyfold::table_linear", _shape, lib=LIBRARY)
