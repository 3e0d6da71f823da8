"""Everything that writes, stopped at every operation and in the middle of files.

JAX and orbax are imported before the forks, once for all children; but nothing may be
computed before, which is why even reading is done in a child.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1  # noqa: F401 (checkpoints imports it late)

from experiments.common.run_folder import Metrics, write_json
from metalstm import rules
from metalstm.data import cache
from metalstm.runtime import checkpoints

from .injection import Fault, count_operations, in_child
from .outcomes import Outcome, require


class Writer(NamedTuple):
    """Something that is written again and again, in versions."""

    name: str
    write: Callable[[Path, int], object]
    # the version that is there, checked to be whole
    read: Callable[[Path], int]


def _state(version: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(version).normal(size=500).astype(np.float32)
    return {"weights": values, "step": np.int32(version)}


def _write_checkpoint(folder: Path, version: int) -> None:
    metadata = {"version": version, "text": "x" * 300}
    checkpoints.save(folder, _state(version), step=version, metadata=metadata)


def _write_checkpoint_again(folder: Path, version: int) -> None:
    checkpoints.save(folder, _state(version), step=7, metadata={"version": version})


def _read_checkpoint(folder: Path) -> int:
    restored = checkpoints.restore(folder, _state(0))
    require(restored.message is None, f"half of one is seen: {restored.message}")
    version = restored.metadata["version"]
    for name, expected in _state(version).items():
        found = np.asarray(restored.state[name])
        require(np.array_equal(found, expected), f"{name} is not that of {version}")
    return version


def _write_rule(folder: Path, version: int) -> None:
    spec = {"rule": "learned_sgd"}
    init = rules.build_rule(spec).init
    rates = jax.eval_shape(lambda: init(jax.random.key(0), np.float32(0)))
    rates = jax.tree.map(lambda x: np.full(x.shape, 0.1 * version, x.dtype), rates)
    rules.save_rule(folder / "rule.npz", spec, rates, info={"version": version})


def _read_rule(folder: Path) -> int:
    return rules.load_rule(folder / "rule.npz").info["version"]


def _write_cache(folder: Path, version: int) -> None:
    (folder / "data.npz").unlink(missing_ok=True)  # it is built when it is not there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            images = _state(version)["weights"]
            cache.cached(folder / "data.npz", lambda: {"images": images})
        except RuntimeWarning as error:  # data are returned, only kept they are not
            raise OSError(f"cannot be written: {error}") from error


def _read_cache(folder: Path) -> int:
    """The version, 0 when there is none: it is built again, from the source."""
    if not (folder / "data.npz").exists():
        return 0
    with np.load(folder / "data.npz") as stored:
        images = stored["images"]
    for version in range(1, 9):
        if np.array_equal(images, _state(version)["weights"]):
            return version
    raise AssertionError("the cache holds what nobody wrote")


def _write_results(folder: Path, version: int) -> None:
    write_json(folder / "results.json", {"version": version, "text": "x" * 5000})


def _read_results(folder: Path) -> int:
    return json.loads((folder / "results.json").read_text())["version"]


def _write_metrics(folder: Path, version: int) -> None:
    """Go on from a checkpoint: forget what came after it, then write on."""
    metrics = Metrics(folder)
    metrics.rewind("maml", 10 * (version - 1))
    for step in range(10):
        metrics.write("maml", "train", 10 * (version - 1) + step + 1, loss=0.5)


def _read_metrics(folder: Path) -> int:
    """The last version whose ten rows are all there, and those before it too."""
    counts = [row["episode"] for row in Metrics(folder).read()]
    require(counts == list(range(1, len(counts) + 1)), "a row is lost or twice there")
    return len(counts) // 10


WRITERS = (
    Writer("checkpoint of a new step", _write_checkpoint, _read_checkpoint),
    Writer("checkpoint of the same step", _write_checkpoint_again, _read_checkpoint),
    Writer("rule file", _write_rule, _read_rule),
    Writer("decode cache", _write_cache, _read_cache),
    Writer("results.json", _write_results, _read_results),
    Writer("metrics.jsonl", _write_metrics, _read_metrics),
)


def stop_everywhere(
    writer: Writer,
    folder: Path,
    *,
    kinds: tuple[str, ...] = ("killed", "full"),
    every: int = 1,
) -> list[Outcome]:
    """Stop ``writer`` at every operation and in the middle of files.

    Args:
      folder: empty, for the trials.
      every: try every so many operations and sizes only.
    """
    base = folder / "base"
    base.mkdir(parents=True)
    for version in (1, 2):
        in_child(lambda v=version: writer.write(base, v), base)
    outcomes = []
    for kind in kinds:
        verb = "killed" if kind == "killed" else "disk full"
        outcome = Outcome(
            f"{verb} while writing: {writer.name}",
            "the version before or the new one is whole, and the next is written",
        )
        faults = _faults(writer, base, kind)[:: every or 1]
        trials = {}
        for fault in faults:
            place = folder / str(fault).replace(" ", "-")
            shutil.copytree(base, place)
            trials[fault] = place
            with outcome.trial(str(fault)):
                ended = in_child(lambda p=place: writer.write(p, 3), place, fault)
                if ended.how == "refused":
                    require("cannot be " in ended.message, ended.message)
                place.with_suffix(".how").write_text(ended.how)
        report = in_child(lambda t=trials: _verify(writer, t), folder)
        outcome.lost += [line for line in report.message.splitlines() if line]
        outcomes.append(outcome)
        for place in trials.values():
            shutil.rmtree(place)
    return outcomes


def _faults(writer: Writer, base: Path, kind: str) -> list[Fault]:
    scratch = base.with_name("scratch")
    shutil.copytree(base, scratch)
    operations = count_operations(lambda: writer.write(scratch, 3), scratch)
    files = [p for p in scratch.rglob("*") if p.is_file()]
    sizes = {p.stat().st_size for p in files} - {0}
    shutil.rmtree(scratch)
    limits = sorted({0} | {s // 2 for s in sizes} | {s - 1 for s in sizes})
    return [
        *(Fault(kind, "operation", n) for n in range(operations)),
        *(Fault(kind, "byte", limit) for limit in limits),
    ]


def _verify(writer: Writer, trials: dict[Fault, Path]) -> str:
    """One line for each trial that is lost."""
    lost = []
    long_ago = time.time() - 7200
    for fault, place in trials.items():
        try:
            marker = place.with_suffix(".how")
            if not marker.exists():
                continue  # counted as lost already
            how, found = marker.read_text(), writer.read(place)
            allowed = (3,) if how == "done" else (0, 2, 3)
            if writer.read is not _read_cache:
                allowed = tuple(v for v in allowed if v)
            require(found in allowed, f"version {found} after {how}")
            for left in place.rglob("*"):
                os.utime(left, (long_ago, long_ago))  # an hour passes
            writer.write(place, found + 1)
            require(writer.read(place) == found + 1, "the next one was not written")
            stray = [p.name for p in place.rglob(".*")]
            require(not stray, f"left behind: {stray}")
        except Exception as error:
            lost.append(f"{fault}: {type(error).__name__}: {error}".splitlines()[0])
    return "\n".join(lost)
