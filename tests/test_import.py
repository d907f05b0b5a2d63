"""Importing the package is cheap, and enough."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fiftyfold
import fiftyfold.modules

PROGRAM = """
import sys
import fiftyfold
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "fiftyfold" in AUTO_QUANTIZER_MAPPING
from fiftyfold.modules.structure import check_log
check_log([{"op": "quantize"}, {"op": "reduce_layers"}])
heavy = {"lightning", "datasets", "torchmetrics", "bitsandbytes", "matplotlib", "jsonargparse"}
print(sorted(heavy & set(sys.modules)))
fiftyfold.load, fiftyfold.export
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_it_registers_plug_in_and_operations_and_leaves_heavy_packages_alone():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr


def test_its_version_is_the_projects():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert fiftyfold.__version__ == tomllib.loads(project.read_text())["project"]["version"]


@pytest.mark.parametrize("name", fiftyfold.__all__)
def test_its_public_names_are_there(name):
    assert getattr(fiftyfold, name) is not None


@pytest.mark.parametrize("name", fiftyfold.modules.__all__)
def test_the_public_names_of_modules_are_there(name):
    assert callable(getattr(fiftyfold.modules, name))


@pytest.mark.parametrize("module", [fiftyfold, fiftyfold.modules])
def test_other_names_are_not(module):
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense
