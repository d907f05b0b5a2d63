"""The command ``fiftyfold kernels``."""

from __future__ import annotations

import time

import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels.build import cache_folder, compiler
from fiftyfold.kernels.cpu import CpuLibrary, cpu_status, describe_status
from fiftyfold.kernels.linear import integer_linear
from fiftyfold.kernels.operators import arrange_weight, packed_linear

_SHAPE = (64, 768, 768)


def kernels() -> None:
    """Tell which kernels compute 1- and 2-bit layers here, test them, and time them against float32.

    Raises:
        FiftyfoldError: if a kernel gives other bits than torch's own operations.
    """
    print(describe_status())
    status = cpu_status()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; compiler: {' '.join(compiler() or ['none'])}")
    if status.library is None:
        print(f"cache of compiled libraries: {cache_folder()}")
        return
    print(f"library: {status.library.file}")
    for path in status.library.paths():
        speed_up = _test_and_time(status.library, path)
        print(f"  {path}: equals torch's own operations bit for bit; {speed_up:.1f} times as fast as float32")


def _test_and_time(library: CpuLibrary, path: str) -> float:
    """Return how many times a ternary layer is faster than a float32 one."""
    tokens, inputs, outputs = _SHAPE
    before = library.path()
    library.choose_path(path)
    try:
        generator = torch.Generator().manual_seed(0)
        x, dense = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
        codes = (torch.randint(0, 3, (outputs, inputs), generator=generator) - 1).to(torch.int8)
        weight, scale = arrange_weight(codes, torch.rand(outputs, 1, generator=generator), 2)
        if not torch.equal(packed_linear(x, weight, scale, bits=2), integer_linear(x, codes, scale)):
            raise FiftyfoldError(f"the {path} kernels give wrong results here; please report this as a bug.")
        with torch.inference_mode():
            packed = _seconds(lambda: packed_linear(x, weight, scale, bits=2))
            return _seconds(lambda: torch.nn.functional.linear(x, dense)) / packed
    finally:
        library.choose_path(before)


def _seconds(call: object) -> float:
    assert callable(call)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]
