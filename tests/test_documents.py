"""What the README and the notebooks show, runs."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def _blocks(path: Path) -> list[str]:
    """The Python blocks of a Markdown file that do not need a trained run."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return [block for block in found if "load_run" not in block]


def test_the_python_of_the_readme_runs_as_it_stands():
    blocks = _blocks(ROOT / "README.md")
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        assert len(block.strip().splitlines()) < 25
        exec(compile(block, "README.md", "exec"), namespace)
    # the blocks leave what they promise: a score, four seeds, the user's own learners
    assert 0 <= namespace["result"].mean <= 1
    assert namespace["metrics"]["loss"].shape == (4, 1)
    for name in ("mine_linen", "mine_nnx"):
        assert callable(namespace[name].apply)
    namespace["pool"] = namespace["glyphs"].train  # docs/pods.md goes on from there
    for block in _blocks(ROOT / "docs" / "pods.md"):
        exec(compile(block, "docs/pods.md", "exec"), namespace)
    assert namespace["metrics"]["loss"].shape == (8, 1)
    assert namespace["one"].step == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", ["nearest neighbour", "mean over parameters"]),
        ("learned_optimizer", ["learned rule   loss", "adam, 0.01     loss"]),
        ("which_method", ["clearly above Meta-LSTM", "points to meta-lstm, paired"]),
    ],
)
def test_a_notebook_runs(name, expected):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("range(300)", "range(3)")
            cell.source = cell.source.replace("range(200)", "range(20)")
            cell.source = cell.source.replace("steps=100", "steps=20")
            cell.source = cell.source.replace("num_episodes=200", "num_episodes=8")
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    text = "".join(o.get("text", "") for out in outputs for o in out)
    for words in expected:
        assert words in text
