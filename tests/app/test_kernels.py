from __future__ import annotations

import re

import pytest

from fiftyfold.app import kernels as command
from fiftyfold.app.main import main
from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import cpu as kernels_of_cpu
from fiftyfold.kernels import operators
from fiftyfold.kernels.backends import backend_for
from fiftyfold.kernels.cpu import cpu_status


def test_it_names_and_tests_the_kernels(capsys):
    if cpu_status().library is None:
        pytest.skip(cpu_status().reason)
    assert main(["kernels"]) == 0
    output = capsys.readouterr().out
    for path in cpu_status().library.paths():
        assert re.search(rf"{path}: equals the reference bit for bit; \S+ \(binary\) and \S+ \(ternary\)", output)


@pytest.mark.parametrize(("factor", "written"), [(0.0345, "0.035"), (1, "1.0"), (3.14, "3.1"), (123.4, "123")])
def test_a_factor_has_two_digits(factor, written):
    assert command._two_digits(factor) == written


@pytest.mark.parametrize("wrong", command._BITS.values())
def test_kernels_that_are_wrong_are_told(monkeypatch, capsys, wrong):
    def packed_linear(x, weight, scale, bits):
        return operators.packed_linear(x, weight, scale, bits=bits) + (bits == wrong)

    monkeypatch.setattr(command, "packed_linear", packed_linear)
    assert main(["kernels"]) == 1
    assert "kernels give wrong results here" in capsys.readouterr().err


def test_without_a_compiler_it_says_so_and_what_to_do(monkeypatch, capsys):
    backend_for("cpu")  # what computes stays what it is for the tests that follow
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(kernels_of_cpu, "prebuilt_library", lambda: None)
    monkeypatch.setattr(kernels_of_cpu, "cpu_status", kernels_of_cpu.cpu_status.__wrapped__)
    monkeypatch.setattr(command, "cpu_status", kernels_of_cpu.cpu_status)
    assert main(["kernels"]) == 0
    output = capsys.readouterr().out
    assert "torch's own operations (no C++ compiler was found)" in output
    assert "install g++" in output
    assert "torch: equals the reference bit for bit" in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FIFTYFOLD_KERNELS": "fast"}, "must be auto, prebuilt, compiled or torch"),
        ({"FIFTYFOLD_KERNELS": "compiled", "CXX": "no-such-compiler"}, "CXX is 'no-such-compiler'"),
        ({"FIFTYFOLD_KERNELS": "torch", "FIFTYFOLD_KERNEL_PATH": "avx2"}, "FIFTYFOLD_KERNEL_PATH is avx2, but torch's"),
        ({"FIFTYFOLD_KERNEL_PATH": "avx9000"}, "this processor has no path 'avx9000'"),
    ],
)
def test_what_cannot_be_had_is_refused(monkeypatch, variables, message):
    if variables == {"FIFTYFOLD_KERNEL_PATH": "avx9000"} and cpu_status().library is None:
        pytest.skip(cpu_status().reason)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FiftyfoldError, match=message):
        cpu_status.__wrapped__()
