"""The first lines that a run prints."""

from __future__ import annotations

from experiments.common import report
from experiments.few_shot.data import Source
from experiments.few_shot.options import Options

_NORMS = {
    "support": "support (inductive)",
    "support+1": "support+1 (inductive)",
    "transductive": "transductive (reads the query batch)",
    "frozen": "frozen (averages over meta-training)",
}


def header(
    options: Options, source: Source, computing: str, query_norm: str | None = None
) -> str:
    """Say on what is computed, from which data, which episodes.

    Args:
      computing: on how many devices.
      query_norm: the batch-norm mode of every method, when it is not each one's own.
    """
    data = options.data
    height, width = source.dataset.image_shape[:2]
    classes = [f"{n:,}" for n in source.describe()["classes"].values()]
    lines = (
        f"{report.machine(computing)}  seed {options.run.seed}\n",
        f"{source.dataset.name} {height}x{width}   train / val / test: ",
        f"{' / '.join(classes)} classes{_about(source)}\n",
        f"{data.way}-way {data.shot}-shot, {data.queries} queries a class, ",
        f"batch norm: {_norm(options, query_norm)}",
    )
    return "".join(lines)


def _norm(options: Options, query_norm: str | None) -> str:
    """How queries are normalised, where that is one answer for all methods."""
    norms = {getattr(own.learner, "norm", "none") for own in options.methods.values()}
    if "batch" not in norms:
        return "none in this learner"
    if query_norm is not None:
        return _NORMS.get(query_norm, query_norm)
    modes = [
        getattr(own.method, "query_norm", None) for own in options.methods.values()
    ]
    chosen = {mode for mode in modes if mode is not None}
    if len(norms) == len(chosen) == 1:
        return _NORMS[chosen.pop()]
    return "by method, see the table"


def _about(source: Source) -> str:
    name, info = source.dataset.name, source.dataset.info
    if name == "glyphs":
        return ", scripts disjoint, look-alikes merged"
    if "summary" in info:
        return f", {info['summary']}"
    omitted = []
    if skipped := info.get("skipped"):
        some = ", ".join(info["skipped_files"][:3]) + ", .." * (skipped > 3)
        omitted.append(f"{skipped} corrupt files ({some})")
    if unlabelled := info.get("unlabelled"):
        omitted.append(f"{unlabelled} images without a label")
    if empty := info.get("empty_classes"):
        omitted.append(f"{len(empty)} classes without an image")
    return f"\n  omitted: {', '.join(omitted)}" if omitted else ""
