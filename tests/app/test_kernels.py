from __future__ import annotations

import pytest

from fiftyfold.app import kernels as command
from fiftyfold.app.main import main
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import cpu as kernels_of_cpu
from fiftyfold.kernels.cpu import cpu_status


def test_it_names_and_tests_the_kernels(capsys):
    if cpu_status().library is None:
        pytest.skip(cpu_status().reason)
    assert main(["kernels"]) == 0
    output = capsys.readouterr().out
    for path in cpu_status().library.paths():
        assert f"{path}: equals torch's own operations bit for bit" in output


def test_without_a_compiler_it_says_so_and_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels_of_cpu, "prebuilt_library", lambda: None)
    monkeypatch.setattr(kernels_of_cpu, "cpu_status", kernels_of_cpu.cpu_status.__wrapped__)
    monkeypatch.setattr(command, "cpu_status", kernels_of_cpu.cpu_status)
    assert main(["kernels"]) == 0
    output = capsys.readouterr().out
    assert "torch's own operations (no C++ compiler was found)" in output
    assert "install g++" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FIFTYFOLD_KERNELS": "fast"}, "must be auto, prebuilt, compiled or torch"),
        ({"FIFTYFOLD_KERNELS": "compiled", "CXX": "no-such-compiler"}, r"no C\+\+ compiler was found"),
        ({"FIFTYFOLD_KERNEL_PATH": "avx9000"}, "this processor has no path 'avx9000'"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, variables, message):
    if "FIFTYFOLD_KERNEL_PATH" in variables and cpu_status().library is None:
        pytest.skip(cpu_status().reason)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FiftyfoldError, match=message):
        cpu_status.__wrapped__()
