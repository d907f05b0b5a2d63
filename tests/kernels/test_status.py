"""What computes is found once, said once, and nothing that goes wrong on the way ends a run."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import backends, build, cpu, training
from fiftyfold.user_cache import user_cache_folder


def test_a_compiler_that_does_not_end_leaves_torchs_operations(tmp_path, monkeypatch):
    program = tmp_path / "sleeping-compiler"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(cpu.SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    monkeypatch.setattr(cpu, "prebuilt_library", lambda: None)
    status = cpu.cpu_status.__wrapped__()
    assert status.library is None
    assert "did not end within" in status.reason


def test_a_library_that_cannot_be_loaded_is_named(tmp_path):
    file = tmp_path / "kernels.so"
    file.write_bytes(b"half a library")
    with pytest.raises(FiftyfoldError, match=r"kernels\.so cannot be loaded .*delete it"):
        cpu.open_library(file, "compiled")


@pytest.fixture
def half_of_it(tmp_path, monkeypatch):
    """A prebuilt library, as if it came with the package, that lost its second half."""
    if cpu.cpu_status().library is None:
        pytest.skip(cpu.cpu_status().reason)
    content = cpu.cpu_status().library.file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    file = tmp_path / f"kernels-{build.source_key()}-{digest}.so"
    file.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    return file


def test_a_library_that_is_not_whole_is_told_before_the_system_loads_it(half_of_it, monkeypatch):
    monkeypatch.setenv(cpu.SOURCE_VARIABLE, "prebuilt")
    with pytest.raises(FiftyfoldError, match=f"is prebuilt, but {half_of_it} is not as it was built"):
        cpu.cpu_status.__wrapped__()


@pytest.mark.parametrize("loads", ["half", "a text"])
def test_a_compiled_library_takes_the_place_of_a_prebuilt_one_that_does_not_load(half_of_it, loads, monkeypatch):
    working = cpu.cpu_status().library.file
    if loads == "a text":
        half_of_it.write_text("no library")
        half_of_it.rename(half_of_it.with_stem(f"kernels-{build.source_key()}-{build._content_digest(half_of_it)}"))
    monkeypatch.setattr(cpu, "compiled_library", lambda: working)
    monkeypatch.delenv(cpu.SOURCE_VARIABLE, raising=False)
    library = cpu.cpu_status.__wrapped__().library
    assert (library.file, library.source) == (working, "compiled")


def test_training_without_the_library_says_so(monkeypatch, caplog):
    status = cpu.Status(None, "no compiler today")
    for module in (cpu, training):
        monkeypatch.setattr(module, "cpu_status", lambda: status)
    cpu.announce_status.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert training._library.__wrapped__() is None
            assert training._library.__wrapped__() is None
    finally:
        cpu.announce_status.cache_clear()
    assert [record.message for record in caplog.records if "no compiler today" in record.message] == [
        cpu.describe_status()
    ]


def test_two_threads_find_a_backend_once(monkeypatch):
    calls = []

    def find():
        calls.append(1)
        time.sleep(0.05)

    monkeypatch.setattr(backends, "_backends", {"nowhere": find})
    monkeypatch.setattr(backends, "_found", {})
    threads = [threading.Thread(target=backends.backend_for, args=("nowhere",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


@pytest.fixture
def operators_of_a_test(monkeypatch):
    with torch.library._scoped_library("fiftyfold", "FRAGMENT") as library:
        monkeypatch.setattr(backends, "LIBRARY", library)
        monkeypatch.setattr(backends, "_backends", {})
        monkeypatch.setattr(backends, "_found", {})
        yield


def test_one_registration_brings_a_new_device(operators_of_a_test):
    def linear(x, *_):
        raise AssertionError

    unused = backends.Backend(arrange=None, linear=None)
    backend = backends.Backend(arrange=lambda codes, bits, groups: codes.view(torch.uint8).flatten(), linear=linear)
    backends.register_backend("xpu", lambda: unused)
    backends.register_backend("xpu", lambda: backend)
    assert backends.backend_for("xpu") is backend
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fiftyfold::packed_linear", "XPU")
    backends.register_backend("xpu", lambda: backend)
    with pytest.raises(FiftyfoldError, match="has an implementation for xpu already"):
        backends.backend_for("xpu")


def test_a_user_without_a_home_is_told(monkeypatch):
    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(FiftyfoldError, match="XDG_CACHE_HOME"):
        user_cache_folder()
