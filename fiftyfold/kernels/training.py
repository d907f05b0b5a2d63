"""Quantization while training, fused: one pass over memory where torch's operations take six or more.

Everything gives the bits of the torch operations in :mod:`fiftyfold.modules.quantization.quantizers`, but for the sums
behind scales, which are added up in another order; scales have 11 bits, so that it hardly ever shows.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from fiftyfold.kernels.backends import backend_for
from fiftyfold.kernels.cpu import announce_status, cpu_status

_GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class _WeightCall(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("per_tensor", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("clip", ctypes.c_float),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class WeightCodes:
    """A quantized weight.

    Attributes:
        codes: int8, (outputs, inputs).
        scale: float16; (1, 1), (outputs, 1) or (outputs, groups).
    """

    codes: torch.Tensor
    scale: torch.Tensor


def is_fused(x: torch.Tensor) -> bool:
    """Tell whether the fake quantizers here take ``x``.

    On a CPU they take dense float32 tensors, where there is the library; on a GPU those of 16 bits, too, where there is
    triton.
    """
    if x.device.type == "cuda":
        return x.dtype in _GPU_TYPES and _is_plain(x) and backend_for("cuda") is not None
    return is_native(x)


def is_native(x: torch.Tensor) -> bool:
    """Tell whether ``x`` lies on the CPU and all functions here take it."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _is_plain(x) and _library() is not None


def fake_quantize_tokens(
    x: torch.Tensor, *, bits: int, full_range: bool, clip: float | None, largest: torch.Tensor | None
) -> torch.Tensor:
    """Quantize and dequantize each token on a symmetric grid.

    Args:
        x: (…, inputs), one that :func:`is_fused` accepts.
        bits: 4 or 8.
        full_range: whether the grid has one more negative code, as XTC's.
        clip: clamp to ``[-clip, clip]`` first.
        largest: largest magnitude of a static range, a scalar; by default each token's own.
    """
    if x.is_cuda:
        from fiftyfold.kernels.triton import activations

        return activations.fake_quantize_tokens(x, bits=bits, full_range=full_range, clip=clip, largest=largest)
    y = torch.empty_like(x)
    bound = None if largest is None else largest.float().contiguous()
    _native().ff_fake_quantize_tokens(
        x.data_ptr(),
        x.numel() // x.shape[-1],
        x.shape[-1],
        bits,
        int(full_range),
        math.inf if clip is None else clip,
        None if bound is None else bound.data_ptr(),
        y.data_ptr(),
    )
    return y


def quantize_weight(
    weight: torch.Tensor, *, bits: int, groups: int, per_tensor: bool, clip: float | None
) -> WeightCodes:
    """Quantize a weight.

    Args:
        weight: (outputs, inputs), one that :func:`is_native` accepts.
        bits: 1 (binary), 2 (ternary), 3, 4 or 8 (uniform).
        groups: of inputs that share a scale, in each output.
        per_tensor: one scale for all.
        clip: clamp to ``[-clip, clip]`` first.
    """
    codes = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty((1, 1) if per_tensor else (len(weight), groups), dtype=torch.float16)
    _run_weight(weight, scale, bits=bits, groups=groups, per_tensor=per_tensor, clip=clip, codes=codes)
    return WeightCodes(codes, scale)


def fake_quantize_weight(
    weight: torch.Tensor, *, bits: int, groups: int, per_tensor: bool, clip: float | None
) -> torch.Tensor:
    """Quantize and dequantize a weight that :func:`is_fused` accepts; arguments as for :func:`quantize_weight`."""
    if weight.is_cuda:
        from fiftyfold.kernels.triton import weights

        return weights.fake_quantize_weight(weight, bits=bits, groups=groups, per_tensor=per_tensor, clip=clip)
    y = torch.empty_like(weight)
    scale = weight.new_empty((1, 1) if per_tensor else (len(weight), groups), dtype=torch.float16)
    _run_weight(weight, scale, bits=bits, groups=groups, per_tensor=per_tensor, clip=clip, y=y)
    return y


def dequantize_weight(weight: WeightCodes) -> torch.Tensor:
    """Return codes times scales, float32 (outputs, inputs)."""
    codes, scale = weight.codes, weight.scale
    y = torch.empty_like(codes, dtype=torch.float32)
    per_tensor = int(len(scale) == 1 and len(codes) != 1)
    _native().ff_dequantize(
        codes.data_ptr(), *codes.shape, scale.shape[1], per_tensor, scale.data_ptr(), y.data_ptr()
    )  # fmt: skip
    return y


def checksum(weight: torch.Tensor) -> int:
    """Return a number that tells whether an entry of a matrix has changed; it costs a fraction of quantizing it."""
    return int(_native().ff_checksum(weight.data_ptr(), *weight.shape))


def _is_plain(x: torch.Tensor) -> bool:
    """Tell whether ``x`` is dense memory, and no tensor of a compiler or another library."""
    return (
        x.is_contiguous()
        and x.numel() > 0
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def _run_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bits: int,
    groups: int,
    per_tensor: bool,
    clip: float | None,
    codes: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> None:
    call = _WeightCall(
        weight.data_ptr(),
        *weight.shape,
        groups,
        int(per_tensor),
        bits,
        math.inf if clip is None else clip,
        None if codes is None else codes.data_ptr(),
        scale.data_ptr(),
        None if y is None else y.data_ptr(),
    )
    _native().ff_quantize_weight(ctypes.byref(call))


def _native() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    status = cpu_status()
    announce_status()
    if status.library is None:
        return None
    library = status.library.functions
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ff_fake_quantize_tokens.argtypes = [pointer, count, count, flag, flag, ctypes.c_float, pointer, pointer]
    library.ff_fake_quantize_tokens.restype = None
    library.ff_quantize_weight.argtypes = [pointer]
    library.ff_quantize_weight.restype = None
    library.ff_dequantize.argtypes = [pointer, count, count, count, flag, pointer, pointer]
    library.ff_dequantize.restype = None
    library.ff_checksum.argtypes = [pointer, count, count]
    library.ff_checksum.restype = ctypes.c_uint64
    return library
