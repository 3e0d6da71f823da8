"""What a run prints and draws."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config import Config
from experiments.sources import Source

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


def header(config: Config, source: Source) -> str:
    have = versions()
    devices = jax.devices()
    kind = devices[0].platform
    if kind != "cpu":
        kind = devices[0].device_kind
    count = f"{len(devices)} device" + "s" * (len(devices) != 1)
    cores = f", {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    data = config.data
    height, width = source.dataset.image_shape[:2]
    classes = [f"{n:,}" for n in source.describe()["classes"].values()]
    norm = _NORMS.get(config.methods.query_norm, config.methods.query_norm)
    if config.learner.norm != "batch" or config.learner.learner == "mlp":
        norm = "none in this learner"
    lines = (
        f"metalstm {have['metalstm']}  jax {have['jax']}  {kind}, {count}{cores}  ",
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
    return ""


def table(rows: Sequence[Mapping[str, Any]], *, caption: str) -> str:
    """The results, one line a row: its name, mean, ci95, difference and learned."""
    lines = [caption]
    width = max(len("method"), *(len(row["name"]) for row in rows))
    lines.append(
        f"  {'method':{width}}  {'accuracy (95% CI)':18}  {'paired difference':18}  "
        "learned parameters"
    )
    for row in rows:
        accuracy = f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}"
        difference = ""
        if row.get("difference") is not None:
            mean, ci95 = row["difference"]
            difference = f"{100 * mean:+.1f} ± {100 * ci95:.1f}"
        learned = f"{row['learned']:,}"
        lines.append(
            f"  {row['name']:{width}}  {accuracy:18}  {difference:18}  {learned:>18}"
        )
    return "\n".join(lines)


def gate_line(summary: Mapping[str, float]) -> str:
    return (
        f"gates: mean f {summary['mean_f']:.4f}, mean i {summary['mean_i']:.4f}; "
        "i's std over tasks {std_i_over_tasks:.2g}, layers {std_i_over_layers:.2g}, "
        "steps {std_i_over_steps:.2g}".format(**summary)
    )


def save_figure(figure: Any, path: Path) -> str:
    figure.savefig(path)
    return path.name


def ending(folder: Path, files: Sequence[str]) -> str:
    return (
        f"{', '.join(files)} in {folder}\n"
        f"to go on: python -m experiments.few_shot --resume {folder}"
    )
