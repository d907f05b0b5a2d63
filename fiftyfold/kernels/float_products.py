"""The quicker of torch's two float32 products on a CPU.

torch multiplies float32 matrices by MKL, which on AMD's processors leaves AVX512 unused. With the precision "medium" it
lets oneDNN multiply, which takes bfloat16 where the processor has matrix units for it (AMX) and *stays with float32*
elsewhere, at twice the speed of MKL on such a processor.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")

# Sums of float32 products err by some 1e-7 of the largest output, those of bfloat16 products by 1e-3.
_LARGEST_ERROR = 1e-5
_SHAPES = ((1, 768, 768), (128, 768, 256), (256, 512, 1024))


def use_fast_float_products(precision: str = "highest") -> str:
    """Set torch's precision of float32 products for this process, and take the quicker product where it is as exact.

    Args:
        precision: the least one that is wanted. ``"highest"`` becomes ``"medium"`` where that is float32 all the same,
            and quicker.

    Returns:
        What was set, with ``torch.set_float32_matmul_precision``.
    """
    chosen = "medium" if precision == "highest" and _medium_is_exact_and_quicker() else precision
    torch.set_float32_matmul_precision(chosen)
    return chosen


@functools.cache
def _medium_is_exact_and_quicker() -> bool:
    # With a GPU, the setting would mean its products as well.
    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if not torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported() or not _is_amd():
        return False
    return _medium_error() < _LARGEST_ERROR


def _is_amd() -> bool:
    return _CPU_INFO.is_file() and "AuthenticAMD" in _CPU_INFO.read_text(encoding="utf-8")


def _medium_error() -> float:
    """Return the largest relative error of products at "medium"; the precision is left at "highest"."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    torch.set_float32_matmul_precision("medium")
    try:
        for rows, inner, columns in _SHAPES:
            a = torch.randn(rows, inner, generator=generator, dtype=torch.float32, device="cpu")
            b = torch.randn(inner, columns, generator=generator, dtype=torch.float32, device="cpu")
            exact = a.double() @ b.double()
            errors.append(float(((a @ b).double() - exact).abs().max() / exact.abs().max()))
    finally:
        torch.set_float32_matmul_precision("highest")
    return max(errors)
