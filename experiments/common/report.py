"""What every command says of itself, and how it writes figures."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import metalstm
from metalstm import plots


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
    """Write the PNG ``path``, and a PDF next to it; return the PNG's name."""
    return plots.save_figure(figure, path)[0].name


def ending(folder: Path, files: Sequence[str]) -> str:
    """Say where the files are; `save_figure` wrote each .png as .pdf too."""
    pdf = any(name.endswith(".png") for name in files)
    return f"{', '.join(files)} in {folder}" + "; figures also as .pdf" * pdf
