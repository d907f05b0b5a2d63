"""What computes is found once, said once, and nothing that goes wrong on the way ends a run."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

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


def test_a_user_without_a_home_is_told(monkeypatch):
    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(FiftyfoldError, match="XDG_CACHE_HOME"):
        user_cache_folder()
