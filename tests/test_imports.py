"""Imports go one way, and `import metalstm` is lean."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from the layers above its own line, and from itself.
LAYERS = (
    {
        "batches",
        "checks",
        "records",
        "runtime",
        "runtime.files",
        "runtime.saved_config",
        "runtime.splitting",
        "statistics",
        "user_objects",
    },
    {
        "calibration",
        "runtime.array_files",
        "runtime.compilation",
        "runtime.exporting",
        "runtime.processes",
        "runtime.sharding",
    },
    {"runtime.products", "tasks"},
    {"base"},
    {"runtime.checkpoint_format"},
    {"rules", "nn", "data", "plots", "runtime.checkpoints"},
    {"inner"},
    {"algorithms"},
    {"learned_optimizers"},
    {"verification"},
    {"meta"},
    {"inputs", "specs"},
    {"predictor"},
    {"run_file", "saving"},
    {"pretrained"},
    {"metalstm"},  # the package's __init__ gathers the public names
    {"experiments"},
    {"benchmarks"},  # starts its processes as experiments does
)

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# likewise of the packages of experiments
PACKAGES = ({"common"}, {"examples", "few_shot", "learned_optimizer"}, {"studies"})
PACKAGE_RANK = {name: rank for rank, layer in enumerate(PACKAGES) for name in layer}
HEAVY = {"matplotlib", "orbax", "tensorflow", "tensorflow_datasets"}
# what flax brings to its NNX users, and what only the command line or decoding needs
NOT_AT_IMPORT = HEAVY | {"IPython", "PIL", "array_record", "flax.nnx", "tqdm", "tyro"}


def component(module: str) -> str:
    """metalstm.rules.gates -> rules; metalstm -> metalstm; experiments.x -> itself."""
    parts = module.split(".")
    if parts[0] != "metalstm" or len(parts) == 1:
        return parts[0]
    if parts[1] == "runtime" and len(parts) > 2:  # half below, half above
        return ".".join(parts[1:3])
    return parts[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    folders = ("metalstm", "experiments", "benchmarks")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imported(tree: ast.AST, module: str) -> list[str]:
    """Names of our own modules that the source imports, anywhere in it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.append(submodule if is_module(submodule) else str(node.module))
    ours = ("metalstm", "experiments", "benchmarks")
    return [name for name in found if name.split(".")[0] in ours]


def violations(source: str, module: str) -> list[str]:
    own = component(module)
    return [
        f"{module} imports {name}"
        for name in imported(ast.parse(source), module)
        if component(name) != own and RANK[component(name)] >= RANK[own]
    ]


def package_violations(source: str, module: str) -> list[str]:
    own = module.split(".")[1]
    found = [
        (name, name.split(".")[1])
        for name in imported(ast.parse(source), module)
        if name.startswith("experiments.")
    ]
    return [
        f"{module} imports {name}"
        for name, other in found
        if other != own and PACKAGE_RANK[other] >= PACKAGE_RANK[own]
    ]


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.parts[-3] == "experiments"], ids=module_name
)
def test_packages_of_experiments_import_one_way(path):
    assert not package_violations(path.read_text(), module_name(path))


def module_imports(package: str) -> dict[str, set[str]]:
    """Of each module, the modules of the same package that it imports at its top."""
    found = {}
    for path in (ROOT / "experiments" / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = imported(tree, module_name(path))
        found[module_name(path)] = {n for n in names if is_module(n)}
    return found


@pytest.mark.parametrize("package", sorted(PACKAGE_RANK))
def test_no_circles_within_a_package_of_experiments(package):
    """Also where Python would bear them, since a name is imported inside a function."""
    left = module_imports(package)
    while left:
        free = {
            name for name, needs in left.items() if not (needs & left.keys()) - {name}
        }
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_one_way(path):
    module = module_name(path)
    assert component(module) in RANK, f"give {component(module)} a place in LAYERS"
    assert not violations(path.read_text(), module)


def test_the_check_notices():
    assert violations("from metalstm import meta", "metalstm.algorithms.maml")
    assert violations("def f():\n  import metalstm.data.pools", "metalstm.base")
    assert violations("import metalstm", "metalstm.predictor")
    assert not violations("from metalstm.base import Batch", "metalstm.data.pools")
    assert not violations("import metalstm", "experiments.few_shot")
    bad = "def f():\n  from experiments.few_shot.data import Source"
    assert package_violations(bad, "experiments.common.report")
    assert not package_violations(bad, "experiments.studies.gates")


def test_no_module_is_named_like_what_it_exports():
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.name != path.stem, f"{path} defines {node.name}"


def in_fresh_python(code: str) -> set[str]:
    """The modules loaded after ``code`` ran in a new interpreter."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.smoke
def test_import_metalstm_is_lean():
    loaded = in_fresh_python("import metalstm")
    assert not NOT_AT_IMPORT & loaded


SCRIPTS = [
    module_name(path)
    for path in sources()
    if path.is_relative_to(ROOT / "experiments")
    # a study and an example are one file each, with their imports on top
    and not {"examples", "studies"} & {*path.parts}
    and 'if __name__ == "__main__":' in path.read_text()
]
HELP = """
import contextlib, runpy, sys
for name in {scripts}:
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    print()
"""


def test_no_script_needs_more_than_its_flags_for_help():
    """Time differs between machines; what is imported does not."""
    assert "experiments.few_shot.__main__" in SCRIPTS
    loaded = in_fresh_python(HELP.format(scripts=SCRIPTS))
    assert not {"jax", "flax", "metalstm", "numpy", "optax"} & loaded
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    of_tyro = {"docstring_parser", "rich", "shtab", "typeguard", "typing_extensions"}
    assert {"experiments", "tyro"} <= packages
    known = {"experiments", "msgspec", "tyro", *of_tyro}
    assert not {p for p in packages if not p.startswith("_")} - known
    assert len(loaded) < 400
