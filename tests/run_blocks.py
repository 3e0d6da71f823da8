"""Run the Python blocks of a Markdown file in order, as a reader would paste them.

``python tests/run_blocks.py README.md`` needs nothing but what the blocks import.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

NEEDS_A_RUN = "load_run"


def blocks(path: Path) -> list[str]:
    """The Python blocks that do not need a trained run."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return [block for block in found if NEEDS_A_RUN not in block]


def run_blocks(path: Path, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute the blocks one after another; return the names that they leave."""
    namespace = {} if namespace is None else namespace
    for block in blocks(path):
        exec(compile(block, path.name, "exec"), namespace)
    return namespace


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run_blocks(Path(argument))
        print(f"{argument}: {len(blocks(Path(argument)))} blocks ran")
