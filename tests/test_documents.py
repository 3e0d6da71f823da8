"""What the README, the documentation, docstrings and notebooks show, runs."""

from __future__ import annotations

import doctest
import importlib
import pydoc
import re
import types
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import optax
import pytest
from run_blocks import blocks, run_blocks

import metalstm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WITH_DOCTESTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "metalstm").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.smoke
def test_the_python_of_the_readme_runs_as_it_stands():
    examples = blocks(ROOT / "README.md")
    assert len(examples) == 3
    assert all(len(block.strip().splitlines()) < 25 for block in examples)
    names = run_blocks(ROOT / "README.md")
    # the blocks leave what they promise: two scores, and a trained model
    assert 0 <= names["ours"].mean <= 1
    assert names["ours"].accuracies.shape == names["theirs"].accuracies.shape
    assert names["loss"] < 0.1
    names["pool"] = names["glyphs"].train  # docs/pods.md goes on from there
    run_blocks(DOCS / "pods.md", names)
    assert names["metrics"]["loss"].shape == (8, 1)
    assert names["one"].step == 1


@pytest.mark.smoke
def test_what_write_your_own_shows_runs_and_is_as_short_as_it_says():
    names = run_blocks(DOCS / "write_your_own.md")
    assert names["state"].step == 3
    episode = names["episode"]
    low_rank = names["maml"].init(jax.random.key(0), episode).learner
    assert sum(leaf.size for leaf in jax.tree.leaves(low_rank.params)) == (
        4 * 2 + 2 * 64 + 64 * 5 + 5
    )
    tx = names["tanh_descent"]().bind({"alpha": 0.1, "beta": 2.0})
    updates, _ = tx.update(jnp.array([0.5, -2.0]), tx.init(()))
    np.testing.assert_allclose(updates, -0.1 * np.tanh([1.0, -4.0]), rtol=1e-6)
    for function, limit in (("net", 5), ("tanh_descent", 10), ("proto_maml", 20)):
        (block,) = (
            block
            for block in blocks(DOCS / "write_your_own.md")
            if f"def {function}(" in block
        )
        block = re.sub('""".*?"""', "", block, flags=re.DOTALL)
        assert len([row for row in block.splitlines() if row.strip()]) <= limit
        assert max(map(len, block.splitlines())) <= 88


def test_what_is_kept_and_served_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(DOCS / "serving.md")
    assert names["scores"].shape == (12, 3)
    assert (tmp_path / "classifier.bin").exists()


@pytest.mark.parametrize("of", ["UpdateRule", "Learner", "MetaAlgorithm"])
def test_help_teaches_how_to_write_one(of):
    said = pydoc.plain(pydoc.render_doc(getattr(metalstm, of)))
    assert "ForwardRef" not in said.split("Method resolution order")[0]
    for slot in typing.get_type_hints(getattr(metalstm, of)).values():
        if getattr(slot, "_is_protocol", False):
            for row in slot.__call__.__doc__.splitlines():
                assert row.strip() in said


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_the_examples_of_docstrings_run(name):
    given = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "metalstm": metalstm}
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs=given,
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted > 0
    assert result.failed == 0


def test_every_page_is_in_the_table_of_contents():
    listed = (DOCS / "index.md").read_text() + (DOCS / "api" / "index.md").read_text()
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    assert len(pages) > 20
    for page in pages:
        assert page.stem == "index" or page.stem in listed, page


def test_the_reference_has_every_public_name():
    contract = (DOCS / "api" / "contract.md").read_text()
    for name in metalstm.base.__all__:
        assert f":: {name}\n" in contract or name in ("Array", "PyTree")
    for package in (metalstm.algorithms, metalstm.rules):  # listed by hand
        page = (DOCS / "api" / f"{package.__name__.split('.')[1]}.md").read_text()
        for name in package.__all__:
            assert f":: {name}\n" in page, name
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in metalstm.__all__:
        thing = getattr(metalstm, name)
        if not isinstance(thing, types.ModuleType):
            room = thing.__module__.split(".")[1]
            assert f":: metalstm.{room}" in reference or room == "base", name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")))
def test_a_notebook_is_stored_with_small_outputs(path):
    assert path.stat().st_size < 300_000
    cells = nbformat.read(path, as_version=4).cells
    assert any(cell.get("outputs") for cell in cells)


# what is made smaller in notebooks, so that they cost seconds
SMALLER = {
    "range(300)": "range(3)",
    "range(200)": "range(20)",
    "steps=100": "steps=20",
    "num_episodes=200": "num_episodes=8",
    "conv4(5, filters=16": "conv4(5, num_blocks=1, filters=2",
    '{"filters": 16': '{"num_blocks": 1, "filters": 2',
    "(1e-3, 3e-3, 1e-2, 3e-2)": "(1e-2,)",
}


def test_what_is_made_smaller_is_in_the_notebooks():
    text = "".join(
        cell.source
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
    )
    assert [long for long in SMALLER if long not in text] == []


@pytest.fixture(scope="module")
def executed() -> dict[str, str]:
    """What each notebook prints; one after another in one kernel, emptied between."""
    cells, last = [], {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells.append(nbformat.v4.new_code_cell("%reset -f"))
        cells += nbformat.read(path, as_version=4).cells
        last[path.stem] = len(cells)
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # each notebook counts from 0
        if cell.cell_type == "code":
            for long, short in SMALLER.items():
                cell.source = cell.source.replace(long, short)
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        timeout=600,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    outputs = [cell.get("outputs", []) for cell in cells]
    texts = ["".join(o.get("text", "") for o in out) for out in outputs]
    starts = [0, *last.values()]
    return {
        name: "".join(texts[start:end])
        for start, (name, end) in zip(starts, last.items(), strict=False)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", ["nearest neighbour", "mean over parameters"]),
        ("learned_optimizer", ["gates-v1   loss", "adam, 0.01  "]),
        ("which_method", ["clearly above Meta-LSTM", "points to meta-lstm, paired"]),
    ],
)
def test_a_notebook_runs(executed, name, expected):
    for words in expected:
        assert words in executed[name]
