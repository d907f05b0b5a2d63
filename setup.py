"""Compiles the C++ kernels into the wheel where there is a compiler; without one the wheel holds Python alone.

The library uses neither Python's headers nor torch's, so one wheel of a platform serves every Python.
``FIFTYFOLD_BUILD_KERNELS=0`` leaves it out, ``=1`` makes a failure an error.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
WANTED = os.environ.get("FIFTYFOLD_BUILD_KERNELS", "auto")


def build_module() -> types.ModuleType:
    """Return ``fiftyfold.kernels.build`` without importing the package, whose dependencies are not there yet."""
    for name, file in (
        ("fiftyfold", None),
        ("fiftyfold.errors", "fiftyfold/errors.py"),
        ("fiftyfold.file_replacement", "fiftyfold/file_replacement.py"),
        ("fiftyfold.user_cache", "fiftyfold/user_cache.py"),
        ("fiftyfold.kernels", None),
        ("fiftyfold.kernels.build", "fiftyfold/kernels/build.py"),
    ):
        module = types.ModuleType(name)
        if file:
            spec = importlib.util.spec_from_file_location(name, ROOT / file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        if file:
            spec.loader.exec_module(module)
    return sys.modules["fiftyfold.kernels.build"]


class BuildWithKernels(build_py):
    """Adds the compiled library to what a wheel holds."""

    def run(self) -> None:
        """Copy the Python files, then compile."""
        super().run()
        if self.editable_mode or WANTED == "0":
            return
        build = build_module()
        folder = Path(self.build_lib) / "fiftyfold" / "kernels" / "prebuilt"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            command = build.compiler()
            if command is None:
                raise build.FiftyfoldError("no C++ compiler was found")
            build.compile_library(folder / f"kernels-{build.source_key()}.so", command)
        except build.FiftyfoldError as error:
            if WANTED == "1":
                raise
            print(f"fiftyfold: the wheel has no compiled kernels: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """Marks the wheel as one of this platform, for every Python, if it holds a library."""

    def finalize_options(self) -> None:
        """Settle the wheel's tag."""
        super().finalize_options()
        self.root_is_pure = WANTED == "0" or build_module().compiler() is None

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its ABI and the platform."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
