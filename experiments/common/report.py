"""What a run prints and draws."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.few_shot.data import Source
from experiments.few_shot.options import Config
from metalstm.runtime.files import atomic_write

_NORMS = {
    "support": "support (inductive)",
    "support+1": "support+1 (inductive)",
    "transductive": "transductive (reads the query batch)",
    "frozen": "frozen (averages over meta-training)",
}


def versions() -> dict[str, str]:
    names = ("metalstm", "jax", "flax", "optax", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            import metalstm

            found[name] = metalstm.__version__ if name == "metalstm" else "unknown"
    return found


def header(config: Config, source: Source, computing: str) -> str:
    """``computing`` says on how many devices."""
    have = versions()
    devices = jax.devices()
    kind = devices[0].platform
    if kind != "cpu":
        kind = devices[0].device_kind
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    data = config.data
    height, width = source.dataset.image_shape[:2]
    classes = [f"{n:,}" for n in source.describe()["classes"].values()]
    norm = _NORMS.get(config.methods.query_norm, config.methods.query_norm)
    if config.learner.norm != "batch" or config.learner.learner == "mlp":
        norm = "none in this learner"
    if any(own.keys() & {"query_norm", "norm"} for own in config.own.values()):
        norm = "by method, see the table"
    lines = (
        f"metalstm {have['metalstm']}  jax {have['jax']}  {kind}, {computing}{cores}  ",
        f"seed {config.run.seed}\n",
        f"{source.dataset.name} {height}x{width}   train / val / test: ",
        f"{' / '.join(classes)} classes{_about(source)}\n",
        f"{data.way}-way {data.shot}-shot, {data.queries} queries a class, ",
        f"batch norm: {norm}",
    )
    return "".join(lines)


def _about(source: Source) -> str:
    name, info = source.dataset.name, source.dataset.info
    if name == "glyphs":
        return ", scripts disjoint, look-alikes merged"
    if "summary" in info:
        return f", {info['summary']}"
    left_out = []
    if skipped := info.get("skipped"):
        some = ", ".join(info["skipped_files"][:3]) + ", .." * (skipped > 3)
        left_out.append(f"{skipped} corrupt files ({some})")
    if unlabelled := info.get("unlabelled"):
        left_out.append(f"{unlabelled} images without a label")
    if empty := info.get("empty_classes"):
        left_out.append(f"{len(empty)} classes without an image")
    return f"\n  left out: {', '.join(left_out)}" if left_out else ""


def gate_line(summary: Mapping[str, float]) -> str:
    return (
        f"gates: mean f {summary['mean_f']:.4f}, mean i {summary['mean_i']:.4f}; "
        "i's std over tasks {std_i_over_tasks:.2g}, layers {std_i_over_layers:.2g}, "
        "steps {std_i_over_steps:.2g}".format(**summary)
    )


def save_figure(figure: Any, path: Path) -> str:
    with atomic_write(path) as part:
        figure.savefig(part)
    return path.name


def ending(folder: Path, files: Sequence[str]) -> str:
    return (
        f"{', '.join(files)} in {folder}\n"
        f"to go on: python -m experiments.few_shot --resume {folder}"
    )
