"""The C++ sources under sanitizers, and for processors that are not at hand: emulated, or compiled across."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from fiftyfold.errors import FiftyfoldError
from fiftyfold.kernels import build
from fiftyfold.kernels.build import SOURCES, compiled_library, compiler

DRIVER = Path(__file__).parent / "driver.cpp"
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
COMMON = ("-std=c++17", "-ffp-contract=off", "-pthread", f"-I{SOURCES}")

pytestmark = pytest.mark.slow


def build_driver(program: Path, command: list[str], *flags: str) -> None:
    sources = [str(DRIVER), *map(str, sorted(SOURCES.glob("*.cpp")))]
    done = subprocess.run(
        [*command, *COMMON, *flags, "-o", str(program), *sources, "-ldl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_driver(command: list[str], cases: int) -> str:
    done = subprocess.run([*command, str(cases)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def host_compiler() -> list[str]:
    command = compiler()
    if command is None:
        pytest.skip("there is no C++ compiler")
    return command


def test_sanitizers_find_nothing(tmp_path):
    build_driver(tmp_path / "driver", host_compiler(), "-O1", "-g", "-fsanitize=address", *UNDEFINED)
    assert "portable checked" in run_driver([str(tmp_path / "driver")], 20)


def test_paths_that_this_processor_has_not_give_the_same_sums(tmp_path):
    if not Path("/usr/include/simde").exists():
        pytest.skip("needs libsimde-dev, to emulate AVX512 and AVX-VNNI")
    # Emulated instructions are whole functions; an optimizing compiler takes minutes to inline them.
    build_driver(tmp_path / "driver", host_compiler(), "-O0", "-DFF_EMULATED", *UNDEFINED)
    output = run_driver([str(tmp_path / "driver")], 4)
    for path in ("amx", "avx512", "avxvnni", "avx2", "portable"):
        assert f"{path} checked" in output


def test_arm_gives_the_same_sums(tmp_path):
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    build_driver(tmp_path / "driver", ["aarch64-linux-gnu-g++"], "-O1", "-static")
    output = run_driver(["qemu-aarch64", "-cpu", "max", str(tmp_path / "driver")], 10)
    for path in ("neondot", "neon", "portable"):
        assert f"{path} checked" in output
    assert "neondot" not in run_driver(["qemu-aarch64", "-cpu", "cortex-a53", str(tmp_path / "driver")], 1)


def test_it_is_compiled_once_and_again_when_it_is_damaged_or_a_source_changes(tmp_path, monkeypatch):
    calls = []

    def compile_library(file, command, flags=build.FLAGS):
        calls.append(file)
        file = file.with_stem(f"{file.stem}-{hashlib.sha256(b'whole').hexdigest()[:16]}")
        file.write_bytes(b"whole")
        return file

    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile_library", compile_library)
    host_compiler()
    assert compiled_library() == compiled_library()
    assert len(calls) == 1
    compiled_library().write_bytes(b"who")
    assert compiled_library().read_bytes() == b"whole"
    assert len(calls) == 2
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    (sources / "new.cpp").write_text("int x;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    compiled_library()
    assert len(calls) == 3
    assert calls[1] != calls[2]


@pytest.mark.parametrize("flags", ["--no-such-flag", "-Dint=@"])
def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, flags):
    with pytest.raises(FiftyfoldError, match="could not compile the kernels"):
        build.compile_library(tmp_path / "kernels.so", host_compiler(), (*build.FLAGS, flags))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    host_compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(FiftyfoldError, match=build.CACHE_VARIABLE):
        compiled_library()
