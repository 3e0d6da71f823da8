"""The wheel holds the library alone; what is said of it elsewhere agrees."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import metalstm

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
    shipped = list((ROOT / "metalstm" / "rules" / "shipped").glob("*.npz"))
    assert shipped
    assert expected | {str(path.relative_to(ROOT)) for path in shipped} <= names
    assert "metalstm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_requirements_are_lean(wheel):
    (metadata,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    required = {
        line.removeprefix("Requires-Dist: ").split(">")[0]
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert required == {"flax", "jax", "numpy", "optax", "orbax-checkpoint"}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_the_same_everywhere():
    assert metalstm.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def pins(name: str) -> dict[str, str]:
    rows = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(row.lower().split("==") for row in rows if not row.startswith("#"))


def test_the_oldest_versions_that_are_allowed_are_tested():
    oldest, newest = pins("py311.txt"), pins("py313.txt")
    for requirement in PROJECT["dependencies"]:
        name, bound = requirement.split(">=")
        if name != "numpy":  # jax's own bound is higher
            assert oldest[name] == bound
        assert name in newest
    for requirements in PROJECT["optional-dependencies"].values():
        named = {
            re.split(r"[\[>=]", r)[0].lower().replace("_", "-") for r in requirements
        }
        assert named - {"metalstm"} <= {name.replace("_", "-") for name in newest}


def test_a_missing_extra_is_named_in_one_sentence(monkeypatch):
    there = importlib.util.find_spec
    gone = ("tyro", "tabulate")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else there(name)
    )
    expected = (
        "needs tabulate, tyro, not installed.*pip install 'metalstm.experiments.'"
    )
    with pytest.raises(SystemExit, match=expected):
        runpy.run_path(str(ROOT / "experiments" / "__init__.py"))


def test_the_extra_holds_what_the_experiments_import():
    """What `experiments` looks for is what its extra installs."""
    source = (ROOT / "experiments" / "__init__.py").read_text()
    looked_for = set(re.findall(r'"(\w+)"', source))
    extra = PROJECT["optional-dependencies"]["experiments"]
    assert looked_for == {requirement.split(">=")[0] for requirement in extra}
