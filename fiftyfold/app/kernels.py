"""The command ``fiftyfold kernels``."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.build import cache_folder, compiler
from fiftyfold.kernels.cpu import CpuLibrary, cpu_status, describe_status
from fiftyfold.kernels.linear import integer_linear
from fiftyfold.kernels.operators import arrange_weight, packed_linear

# So many outputs that binary codes are looked up where lookups pay.
_SHAPE = (64, 768, 768)
_BITS = {"binary": 1, "ternary": 2}


def kernels() -> None:
    """Tell what computes 1- and 2-bit layers here, test it, and time it against float32.

    Raises:
        FiftyfoldError: if a kernel gives other bits than the reference.
    """
    print(describe_status())
    status = cpu_status()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; compiler: {' '.join(compiler() or ['none'])}")
    if status.library is None:
        print(f"cache of compiled libraries: {cache_folder()}")
        print(f"  {_report('torch')}")
        return
    print(f"library: {status.library.file}")
    for path in status.library.paths():
        print(f"  {_on_path(status.library, path)}")


def _on_path(library: CpuLibrary, path: str) -> str:
    before = library.path()
    library.choose_path(path)
    try:
        return _report(path)
    finally:
        library.choose_path(before)


def _report(name: str) -> str:
    """Return in one line what a test and a measurement of what computes now found."""
    found = [f"{_two_digits(_test_and_time(name, bits))} ({kind})" for kind, bits in _BITS.items()]
    return f"{name}: equals the reference bit for bit; {' and '.join(found)} times as fast as float32"


def _test_and_time(name: str, bits: int) -> float:
    """Return how many times a packed layer is faster than a float32 one.

    Raises:
        FiftyfoldError: if its outputs are wrong.
    """
    tokens, inputs, outputs = _SHAPE
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    codes = torch.randint(0, bits + 1, (outputs, inputs), generator=generator)
    codes = (codes * 2 - 1 if bits == 1 else codes - 1).to(torch.int8)
    weight, scale = arrange_weight(codes, torch.rand(outputs, 1, generator=generator), bits)
    with torch.inference_mode():
        for some in (x, x[:1]):  # one token takes ways of its own
            if not torch.equal(packed_linear(some, weight, scale, bits=bits), integer_linear(some, codes, scale)):
                raise FiftyfoldError(f"the {name} kernels give wrong results here; please report this as a bug.")
        # In turn, so that a slow moment of the machine meets both.
        plain, packed = [], []
        for _ in range(7):
            plain.append(_seconds(lambda: torch.nn.functional.linear(x, dense)))
            packed.append(_seconds(lambda: packed_linear(x, weight, scale, bits=bits)))
        return median(plain) / median(packed)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _two_digits(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 10 else f"{factor:#.2g}"
