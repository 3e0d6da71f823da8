"""What every command says of itself, and how it writes figures."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import metalstm
from metalstm.runtime.files import atomic_write


def versions() -> dict[str, str]:
    installed = ("jax", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in installed}
    return {"metalstm": metalstm.__version__, **found}


def machine(computing: str) -> str:
    """The first line that a run prints: versions, and on what is computed."""
    have, first = versions(), jax.devices()[0]
    kind = "cpu" if first.platform == "cpu" else first.device_kind
    return (
        f"metalstm {have['metalstm']}  jax {have['jax']}  {kind}, {computing}, "
        f"{os.cpu_count()} cores"
    )


def save_figure(figure: Any, path: Path) -> str:
    with atomic_write(path) as part:
        figure.savefig(part)
    return path.name


def ending(folder: Path, files: Sequence[str]) -> str:
    return f"{', '.join(files)} in {folder}"
