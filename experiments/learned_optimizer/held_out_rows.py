"""What the cells of `held_out` say: complete rows, and measures of them.

Notation: T tasks, R seeds, 21 recorded losses of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from experiments.common.saved_options import read_json
from experiments.learned_optimizer.held_out_cells import (
    FALLBACK,
    OPTIMIZERS,
    RECORDS,
    RULE_SCHEDULES,
    SEEDS,
    TUNE_SEED,
    Cells,
    Runs,
    Trial,
    around,
    best_trial,
    finite,
    from_name,
    name_of,
    next_trial,
)
from experiments.learned_optimizer.held_out_tasks import TASKS, VERSION

_RESAMPLES = 10_000

Found = dict[str, dict[str, Runs]]  # of each task, of each optimizer


class Row(NamedTuple):
    """One optimizer, tuned or not, on one task."""

    trial: Trial
    curves: np.ndarray  # [R, 21], infinite where not finite
    trials: int
    inside: bool | None  # lower and higher rates were tried; None: nothing was tuned
    by_rate: np.ndarray  # [7] last losses at other rates; [0]: not run

    @property
    def median(self) -> float:
        return float(np.median(self.curves[:, -1]))

    @property
    def diverged(self) -> np.ndarray:
        """Of each seed: not finite, or above the first loss."""
        return ~(self.curves[:, -1] <= self.curves[:, 0])


Rows = dict[str, dict[str, Row]]  # of each label, of each task


# -- cells -----------------------------------------------------------------------------


def read_cells(folder: Path) -> Found:
    """The losses of all cells in the folder of `held_out`.

    Raises:
      ValueError: a cell is damaged.
    """
    found: Found = {}
    for path in sorted((folder / f"v{VERSION}").glob("*/*")):
        task, optimizer = path.parts[-2:]
        if runs := Cells(folder, task, optimizer).read():
            found.setdefault(task, {})[optimizer] = runs
    return found


_Losses = Annotated[list[float | None], msgspec.Meta(min_length=1)]


class _Document(msgspec.Struct):
    version: int
    losses: dict[str, dict[str, dict[str, _Losses]]]  # of each task, optimizer, cell


def read_document(path: Path) -> Found:
    """The cells of a ``held_out.json`` that the report wrote.

    Raises:
      ValueError: it is damaged, or of another version of the test.
    """
    remedy = "put a copy of it back, or choose another --report"
    document = read_json(path, _Document, remedy)
    if document.version != VERSION:
        raise ValueError(
            f"{path} is of version {document.version} of the test, and this is "
            f"{VERSION}: choose another --report"
        )
    found: Found = {}
    for task, optimizers in document.losses.items():
        for optimizer, runs in optimizers.items():
            of = found.setdefault(task, {})[optimizer] = {}
            for name, losses in runs.items():
                which = from_name(name)
                tuning = which is not None and which[1] == TUNE_SEED
                if which is None or len(losses) != (1 if tuning else RECORDS + 1):
                    raise ValueError(
                        f"{path} is damaged ({task} {optimizer} {name}): {remedy}"
                    )
                of[which] = finite(losses)
    return found


def names_of(found: Found) -> set[str]:
    """Task, optimizer and name of each cell."""
    return {
        f"{task}/{optimizer}/{name_of(*which)}"
        for task, optimizers in found.items()
        for optimizer, runs in optimizers.items()
        for which in runs
    }


def to_json(found: Found) -> dict[str, Any]:
    """All that the report needs: of tuning's trials only their last losses."""

    def rounded(losses: np.ndarray, seed: int) -> list[float | None]:
        used = losses[-1:] if seed == TUNE_SEED else losses
        return [float(f"{x:.6g}") if np.isfinite(x) else None for x in used]

    losses = {
        task: {
            optimizer: {
                name_of(trial, seed): rounded(run, seed)
                for (trial, seed), run in runs.items()
            }
            for optimizer, runs in optimizers.items()
        }
        for task, optimizers in found.items()
    }
    return {"version": VERSION, "losses": losses}


# -- rows ------------------------------------------------------------------------------


def rows_of(found: Found) -> tuple[Rows, list[str]]:
    """The rows that are complete, and what is missing, a line a task."""
    names = dict.fromkeys([*OPTIMIZERS, *(n for one in found.values() for n in one)])
    rows: Rows = {}
    begun = [task for task in TASKS if task in found]
    rest = [task for task in TASKS if task not in found]
    missing = [f"{', '.join(rest)}: not begun"] if rest else []
    for task in begun:
        absent = [name for name in names if name not in found[task]]
        said = [f"{', '.join(absent)} not begun"] if absent else []
        for name in [name for name in names if name not in absent]:
            runs, optimizer = found[task][name], OPTIMIZERS.get(name)
            schedules = optimizer.schedules if optimizer else RULE_SCHEDULES
            scores = {
                t: run[-1] for (t, seed), run in runs.items() if seed == TUNE_SEED
            }
            wanted = {}
            if optimizer is None:
                wanted[name] = Trial(0, schedules[0])
            if not name.endswith(FALLBACK):
                if next_trial(schedules, scores) is None:
                    wanted[name if optimizer else f"{name}, tuned"] = best_trial(scores)
                else:
                    said.append(f"{name} has {len(scores)} trials, more are to come")
            for label, trial in wanted.items():
                have = sum((trial, seed) in runs for seed in SEEDS)
                if have < len(SEEDS):
                    said.append(f"{label} has {have} of {len(SEEDS)} seeds")
                    continue
                tuned = optimizer is not None or label != name
                rows.setdefault(label, {})[task] = _row(trial, runs, tuned)
        if said:
            missing.append(f"{task}: {'; '.join(said)}")
    labels = [label for name in names for label in (name, f"{name}, tuned")]
    return {label: rows[label] for label in labels if label in rows}, missing


def _row(trial: Trial, runs: Runs, tuned: bool) -> Row:
    tried = [t.step for t, seed in runs if seed == TUNE_SEED]
    rates = [(other, SEEDS[0]) for other in around(trial)]
    complete = all(one in runs for one in rates)
    return Row(
        trial,
        curves=np.stack([runs[trial, seed] for seed in SEEDS]),
        trials=len(tried) if tuned else 1,
        inside=min(tried) < trial.step < max(tried) if tuned else None,
        by_rate=np.array([runs[one][-1] for one in rates if complete]),
    )


# -- measures --------------------------------------------------------------------------


def ratio(loss: float, reference: float) -> float:
    """Loss over the reference's; NaN where a loss is not above 0, or none of AdamW's.

    >>> ratio(1.0, 2.0), ratio(float("inf"), 2.0), ratio(-1.0, 2.0)
    (0.5, inf, nan)
    """
    has_ratio = loss > 0 and 0 < reference < np.inf
    return loss / reference if has_ratio else float("nan")


def iqm(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half along the last axis.

    A value that lies partly in the middle half counts in part.

    >>> float(iqm(np.array([1.0, 2.0, 3.0, 100.0])))
    2.5
    """
    ordered = np.sort(np.asarray(values, np.float64), -1)
    edges = np.linspace(0, 1, ordered.shape[-1] + 1)
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, 1)
    used = inside > 0  # an infinite loss outside the middle half does not count
    return ordered[..., used] @ inside[used] / inside.sum()


def iqm_interval(losses: np.ndarray, references: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the IQM over tasks of ratios of medians over seeds.

    Tasks are resampled, and the seeds of each, the same for both optimizers: they have
    the same starts and minibatches.

    Args:
      losses, references: [T, R].
    """
    rng = np.random.default_rng(0)
    num_tasks, num_seeds = losses.shape
    tasks = rng.integers(num_tasks, size=(_RESAMPLES, num_tasks, 1))
    seeds = rng.integers(num_seeds, size=(_RESAMPLES, num_tasks, num_seeds))
    medians = (np.median(x[tasks, seeds], -1) for x in (losses, references))
    found = iqm(np.divide(*medians))
    # between infinite values there is nothing to interpolate
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def share_until(curves: np.ndarray, loss: float) -> float:
    """Share of the updates until the seeds' median is at ``loss``; infinite if never.

    >>> share_until(np.array([[4.0, 3.0, 2.0]]), 3.0)
    0.5
    """
    at = np.flatnonzero(np.median(curves, 0) <= loss)
    return float(at[0]) / (curves.shape[1] - 1) if len(at) else float("inf")
