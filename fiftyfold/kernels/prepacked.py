"""The CPU's backend without a compiled library, on x86 without VNNI: torch's 8-bit product of prepacked weights.

That product adds pairs of products in 16 bits, which is enough for codes of 1 and 2 bits: ``2 * 255 * 1``. A weight's
bytes are its codes as they are stored; the prepacked weight, a byte for each code, is kept beside them as long as they
live, and made again where they come without it, as from an exported program.
"""

# An operator's implementation takes all that its schema lists, by position.
# ruff: noqa: PLR0917

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.backends import PACKED_BITS, Backend
from fiftyfold.kernels.linear import check_linear, int8_product_is_exact, rescaled_products
from fiftyfold.kernels.packing import pack_codes, packed_bytes, unpack_codes

_ZERO_POINT = 128
_ENGINE = "fbgemm"


@dataclass(frozen=True)
class _Prepacked:
    """A weight as torch's product reads it: a part for each group of inputs, and of how many codes."""

    parts: Sequence[Any]
    bytes: int


_kept = WeakTensorKeyDictionary()
_engine_in_use = threading.Lock()


def find() -> Backend | None:
    """Return the backend if it pays here and computes exactly."""
    if int8_product_is_exact() or not _is_exact():  # the former is torch's other product, which needs nothing prepacked
        return None
    return Backend(arrange=arrange, linear=linear)


def arrange(codes: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """Return the bytes of codes (outputs, inputs), and prepack the codes at once."""
    outputs, inputs = codes.shape
    packed = pack_codes(codes, bits)
    weight = F.pad(packed, (0, _arranged_bytes(outputs, inputs, bits) - len(packed)))
    _kept[weight] = _prepack(codes, groups)
    return weight


def linear(
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
    """Implement the operator ``fiftyfold::packed_linear``, see :func:`fiftyfold.kernels.operators.packed_linear`.

    Raises:
        FiftyfoldError: if the shapes do not fit, or the weight was not arranged here.
    """
    outputs, inputs = scale.shape[-1], x.shape[-1] if x.dim() else 0
    check_linear(x, (outputs, inputs), scale, activation_bits)
    size = _arranged_bytes(outputs, inputs, bits) if bits in PACKED_BITS else -1
    if weight.dtype != torch.uint8 or weight.shape != (size,):
        raise FiftyfoldError("the weight was not arranged for this input, these scales and these bits on this machine.")
    kept: _Prepacked | None = _kept.get(weight)
    if kept is None or len(kept.parts) != len(scale):
        count = outputs * inputs
        codes = unpack_codes(weight[: packed_bytes(count, bits)], bits, count).view(outputs, inputs)
        kept = _kept[weight] = _prepack(codes, len(scale))
    products = [functools.partial(_multiply, part) for part in kept.parts]
    return rescaled_products(
        x, products, scale, bias, bits=activation_bits, full_range=full_range, clip=clip, largest=largest
    )


def prepacked_bytes(weight: torch.Tensor) -> int:
    """Return the bytes that are kept beside an arranged weight."""
    kept: _Prepacked | None = _kept.get(weight)
    return 0 if kept is None else kept.bytes


def _arranged_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Return an odd number, which no arrangement of the library has: none can be taken for the other."""
    return packed_bytes(outputs * inputs, bits) | 1


def _prepack(codes: torch.Tensor, groups: int) -> _Prepacked:
    with _engine(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will drop its quantized tensors some day
        quantized = [torch._make_per_tensor_quantized_tensor(part, 1.0, 0) for part in codes.chunk(groups, 1)]
        return _Prepacked([torch.ops.quantized.linear_prepack(part, None) for part in quantized], codes.numel())


@contextmanager
def _engine() -> Iterator[None]:
    """Set torch's engine, which decides who prepacks, and put back the user's."""
    with _engine_in_use:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = _ENGINE
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def _multiply(part: Any, x: torch.Tensor) -> torch.Tensor:
    if not len(x):
        return x.new_zeros(0, part.unpack()[0].shape[0])
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    sums: torch.Tensor = operator(x, 1.0, _ZERO_POINT, part)
    return sums


def _is_exact() -> bool:
    """Try the product where it is hardest: inputs and codes at their ends, and sums of both signs."""
    generator = torch.Generator("cpu").manual_seed(0)
    codes = torch.randint(-1, 2, (67, 1030), generator=generator, dtype=torch.int8, device="cpu")
    codes[0], codes[1] = 1, -1
    x = torch.randint(-128, 128, (9, 1030), generator=generator, dtype=torch.float32, device="cpu")
    x[0], x[1], x[2] = -128, 127, 0
    x[3, ::2], x[3, 1::2] = -128, 127
    try:
        return torch.equal(_multiply(_prepack(codes, 1).parts[0], x), x @ codes.t().float())
    except (AttributeError, RuntimeError):  # torch has lost the product, or was built without it
        return False
