"""The wheel holds the library alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    # no isolation: the backend is among the test requirements, no network is needed
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_metalstm_alone(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"metalstm"}


def test_the_wheel_holds_every_module_and_the_type_marker(wheel):
    expected = {
        str(path.relative_to(ROOT)) for path in (ROOT / "metalstm").rglob("*.py")
    }
    names = set(wheel.namelist())
    shipped = (ROOT / "metalstm" / "shipped").glob("*.npz")
    assert expected | {str(path.relative_to(ROOT)) for path in shipped} <= names
    assert "metalstm/py.typed" in names
    assert not [name for name in names if "__pycache__" in name]


def test_requirements_are_lean(wheel):
    (metadata,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    required = {
        line.removeprefix("Requires-Dist: ").split(">")[0]
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert required == {"flax", "jax", "numpy", "optax"}


def test_version_is_the_same_everywhere():
    import metalstm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metalstm.__version__ == project["version"]
