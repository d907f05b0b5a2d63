"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Set before transformers is imported: no test touches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Set before torch is imported: Lightning gives a process more threads otherwise, and those do not survive a fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set before torch and triton are imported. GPUs are hidden, for processes that were forked cannot use them, and bits
# are compared with those of the CPU; kernels for them are interpreted. tests/test_gpu.py tells how to test on a GPU.
if os.environ.get("FIFTYFOLD_TESTS_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.tiny import tiny_batch, tiny_bert


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and bit-identity must not hang on their number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def bert():
    return tiny_bert()


@pytest.fixture
def batch():
    return tiny_batch()
