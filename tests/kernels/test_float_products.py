from __future__ import annotations

import pytest
import torch

from fiftyfold.kernels import float_products
from fiftyfold.kernels.float_products import use_fast_float_products


@pytest.fixture(autouse=True)
def _precision_as_before():
    float_products._medium_is_exact_and_quicker.cache_clear()
    yield
    torch.set_float32_matmul_precision("highest")
    float_products._medium_is_exact_and_quicker.cache_clear()


def pretend(monkeypatch, *, avx512: bool, amx: bool, amd: bool, error: float = 1e-7) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(float_products, "_is_amd", lambda: amd)
    monkeypatch.setattr(float_products, "_medium_error", lambda: error)


def test_the_quicker_product_is_taken_where_it_is_exact(monkeypatch):
    pretend(monkeypatch, avx512=True, amx=False, amd=True)
    assert use_fast_float_products() == torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    "machine",
    [
        {"avx512": False, "amx": False, "amd": True},
        {"avx512": True, "amx": True, "amd": False},
        {"avx512": True, "amx": True, "amd": True},
        {"avx512": True, "amx": False, "amd": False},
        {"avx512": True, "amx": False, "amd": True, "error": 1e-3},
    ],
    ids=str,
)
def test_elsewhere_products_stay_as_they_are(machine, monkeypatch):
    pretend(monkeypatch, **machine)
    assert use_fast_float_products() == torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_what_was_asked_for_is_set(precision):
    assert use_fast_float_products(precision) == torch.get_float32_matmul_precision() == precision


def test_the_check_tells_float32_from_bfloat16(monkeypatch):
    if not torch.cpu._is_amx_tile_supported():
        assert float_products._medium_error() < float_products._LARGEST_ERROR
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: product(a, b) if a.dtype == torch.float64 else product(a.bfloat16(), b.bfloat16()).float(),
    )
    assert float_products._medium_error() > float_products._LARGEST_ERROR
    assert torch.get_float32_matmul_precision() == "highest"
