"""The held-out test of a rule for ordinary training, cell by cell.

Claim: with its default a gate rule ends lower than AdamW with a tuned rate and schedule
on most of ten tasks whose data and architectures it was not trained on.

    python -m experiments.learned_optimizer.held_out --data-dir DIR --rule FILE.npz
    python -m experiments.learned_optimizer.held_out --report    # what is there so far

Every optimizer has the same nine trials for each task, on another seed than is
reported: the rate moves by factors of sqrt(10) from its default, with a cosine, until
the best has a worse neighbour on both sides (seven trials at most); the last ones try
the best rate at other schedules. A gate rule has one trial, its default (row "NAME"),
and nine, in which its updates are multiplied (row "NAME, tuned"). Then three seeds are
trained with the best trial. A cell is one training run, a JSON file in the folder;
cells that are there are not run again, so the command may be stopped at any time.

About 60 hours of one core for all tasks and six optimizers; `--tasks` and
`--optimizers` choose. docs/results/learned_optimizers.md has the results.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from optax import contrib

from experiments.common.cli import Names, Options, check_names, parse
from experiments.common.run_folder import write_json
from experiments.learned_optimizer.held_out_tasks import TASKS, VERSION, HeldOut, Loaded
from metalstm import rules
from metalstm.learned_optimizers import make_loss_curves

MODULE = "experiments.learned_optimizer.held_out"
TRIALS, RATE_TRIALS = 9, 7
TUNE_SEED, SEEDS = 1_000, (0, 1, 2)
EVAL_BATCH, RECORDS = 1_024, 20
_FACTOR = 10**0.5


class Optimizer(NamedTuple):
    """``make(rate, num_steps)``: the rate is a number or a schedule."""

    make: Callable[[Any, int], optax.GradientTransformation]
    rate: float  # where tuning starts
    schedules: tuple[str, ...] = ("cosine", "constant", "warmup")  # the first for rates
    # (state, params) -> the parameters that are measured
    averaged: Callable[[Any, Any], Any] | None = None


def _schedule_free(rate: Any, num_steps: int) -> optax.GradientTransformation:
    return contrib.schedule_free_adamw(rate, warmup_steps=num_steps // 20)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(lambda rate, _: optax.adamw(rate), 1e-3),
    "momentum": Optimizer(lambda rate, _: optax.sgd(rate, 0.9, nesterov=True), 0.1),
    "lion": Optimizer(lambda rate, _: optax.lion(rate), 1e-4),
    "muon": Optimizer(lambda rate, _: contrib.muon(rate, consistent_rms=0.2), 1e-3),
    "schedule-free": Optimizer(
        _schedule_free, 3e-3, ("constant",), contrib.schedule_free_eval_params
    ),
}


def gate_rule(path: Path) -> Optimizer:
    """A trained rule, told its progress; its rate multiplies its updates."""
    learned = rules.load_rule(path).transform()

    def make(rate: Any, num_steps: int) -> optax.GradientTransformation:
        by = optax.scale_by_schedule(rate) if callable(rate) else optax.scale(rate)
        return optax.chain(rules.with_progress(learned, num_steps), by)

    return Optimizer(make, 1.0, ("constant", "cosine", "warmup"))


class Config(Options, frozen=True):
    data_dir: Path = Path("data")
    """Has mini_imagenet and tensorflow_datasets."""
    folder: Path = Path("runs") / "held_out"
    """Where the cells are."""
    rule: tuple[Path, ...] = ()
    """Files of trained rules, rows of their own by the files' names."""
    tasks: Names = tuple(TASKS)
    """Which tasks."""
    optimizers: Names = tuple(OPTIMIZERS)
    """Which optimizers to compare with."""
    report: bool = False
    """Print what is there, and run nothing."""


class Trial(NamedTuple):
    """A point of the search: rate * sqrt(10)^step with a schedule."""

    step: int
    schedule: str

    def rate(self, optimizer: Optimizer, num_steps: int) -> Any:
        peak = optimizer.rate * _FACTOR**self.step
        if self.schedule == "cosine":
            return optax.cosine_decay_schedule(peak, num_steps)
        if self.schedule == "warmup":
            warm = num_steps // 20
            return optax.warmup_cosine_decay_schedule(0, peak, warm, num_steps)
        return peak


def next_trial(optimizer: Optimizer, scores: dict[Trial, float]) -> Trial | None:
    """The trial that the search makes after ``scores``, None at its end.

    A function of the scores alone, so that a stopped search resumes. Losses that are
    not finite count as infinite, and among equal scores the smaller rate is the best.
    """
    if len(scores) >= TRIALS:
        return None
    first, *others = optimizer.schedules
    of_rates = {t.step: score for t, score in scores.items() if t.schedule == first}
    if not of_rates:
        return Trial(0, first)
    best = min(sorted(of_rates), key=lambda step: of_rates[step])
    bracketed = best - 1 in of_rates and best + 1 in of_rates
    if not others or (len(of_rates) < RATE_TRIALS and not bracketed):
        # the nearest to the best that was not tried
        outwards = (best + sign * by for by in range(1, TRIALS) for sign in (-1, 1))
        return Trial(next(step for step in outwards if step not in of_rates), first)
    left = [Trial(best + by, name) for by in (0, 1, -1, 2, -2) for name in others]
    return next((trial for trial in left if trial not in scores), None)


def best_trial(scores: dict[Trial, float]) -> Trial:
    return min(sorted(scores), key=lambda trial: scores[trial])


# -- cells -----------------------------------------------------------------------------


def train(
    task: HeldOut, loaded: Loaded, optimizer: Optimizer, trial: Trial, seed: int
) -> dict[str, Any]:
    """Train once: the losses on EVAL_BATCH examples at 21 equally spaced times."""
    tx = optimizer.make(trial.rate(optimizer, task.num_steps), task.num_steps)
    run = make_loss_curves(
        loaded.family,
        tx,
        num_instances=1,
        num_steps=task.num_steps,
        record_every=task.num_steps // RECORDS,
        eval_batch=EVAL_BATCH,
        task_mapping="unroll",
        measured=optimizer.averaged,
    )
    started, cpu = time.monotonic(), time.process_time()
    losses = run((), loaded.data, seed)[0]
    return {
        "losses": [float(x) if math.isfinite(x) else None for x in losses],
        "seconds": round(time.monotonic() - started, 1),  # with compilation
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def _score(cell: dict[str, Any]) -> float:
    last = cell["losses"][-1]
    return float("inf") if last is None else last


class Cells:
    """The cells of one task and optimizer, which are files."""

    def __init__(self, folder: Path, task: str, optimizer: str):
        self.folder = folder / f"v{VERSION}" / task / optimizer

    def path(self, trial: Trial, seed: int) -> Path:
        return self.folder / f"{trial.schedule}{trial.step:+d}-seed{seed}.json"

    def read(self, trial: Trial, seed: int) -> dict[str, Any] | None:
        path = self.path(trial, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def scores(self) -> dict[Trial, float]:
        """Of the tuning's trials so far."""
        found = {}
        for path in sorted(self.folder.glob(f"*-seed{TUNE_SEED}.json")):
            cell = json.loads(path.read_text())
            found[Trial(cell["step"], cell["schedule"])] = _score(cell)
        return found


def missing(cells: Cells, optimizer: Optimizer, is_rule: bool) -> Iterator:
    """The (trial, seed) that are to be run, in order; each is run before the next."""
    if is_rule:  # one trial: the default, nothing tuned
        default = Trial(0, optimizer.schedules[0])
        yield from ((default, s) for s in SEEDS if cells.read(default, s) is None)
    while (trial := next_trial(optimizer, cells.scores())) is not None:
        yield trial, TUNE_SEED
    best = best_trial(cells.scores())
    yield from ((best, s) for s in SEEDS if cells.read(best, s) is None)


def run(config: Config, optimizers: dict[str, Optimizer]) -> None:
    """Run every missing cell, one task after another."""
    for task_name in config.tasks:
        task, loaded = TASKS[task_name], None
        for name, optimizer in optimizers.items():
            cells = Cells(config.folder, task_name, name)
            for trial, seed in missing(cells, optimizer, name not in OPTIMIZERS):
                loaded = loaded or task.load(config.data_dir)
                cell = train(task, loaded, optimizer, trial, seed)
                cell |= trial._asdict() | {"seed": seed, "jax": jax.__version__}
                path = cells.path(trial, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, cell)
                print(
                    f"{task_name} {path.stem} of {name}: {_score(cell):.4g}", flush=True
                )
        jax.clear_caches()


# -- report ----------------------------------------------------------------------------


def final_losses(cells: Cells, trial: Trial) -> np.ndarray | None:
    """Of the seeds, float64 [3]; None while one is missing."""
    found = [cell for seed in SEEDS if (cell := cells.read(trial, seed)) is not None]
    return np.array(list(map(_score, found))) if len(found) == len(SEEDS) else None


def report(config: Config, optimizers: dict[str, Optimizer]) -> str:
    """Median final losses, and their ratios to tuned AdamW's, of what is complete."""
    lines = [
        f"held-out test {VERSION}: median final loss of {len(SEEDS)} seeds (ratio)"
    ]
    ratios: dict[str, list[float]] = {}
    for task in config.tasks:
        row = [f"{task:12s}"]
        reference = None
        for name, optimizer in optimizers.items():
            cells = Cells(config.folder, task, name)
            scores = cells.scores()
            rows = {}
            if name not in OPTIMIZERS:
                rows[name] = Trial(0, optimizer.schedules[0])
            if next_trial(optimizer, scores) is None:
                rows[name if name in OPTIMIZERS else f"{name}, tuned"] = best_trial(
                    scores
                )
            for label, trial in rows.items():
                losses = final_losses(cells, trial)
                if losses is None:
                    continue
                median = float(np.median(losses))
                reference = median if name == "adamw" else reference
                ratio = median / reference if reference else float("nan")
                ratios.setdefault(label, []).append(ratio)
                row.append(f"{label} {median:.4g} ({ratio:.2f})")
        lines.append("  ".join(row))
    for label, values in ratios.items():
        lines.append(f"{label}: interquartile mean of ratios {iqm(values):.3f}")
    return "\n".join(lines)


def iqm(values: Sequence[float]) -> float:
    """The mean of the middle half, the ends of it weighted by the share inside.

    >>> iqm([1.0, 2.0, 3.0, 100.0])
    2.5
    """
    ordered = np.sort(np.asarray(values, np.float64))
    edges = np.linspace(0, 1, len(ordered) + 1)
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, 1)
    used = inside > 0  # an infinite loss outside the middle half does not count
    return float((inside[used] * ordered[used]).sum() / inside.sum())


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    config = parse(Config(), words, module=MODULE, description=__doc__)
    check_names("--tasks", config.tasks, TASKS)
    check_names("--optimizers", config.optimizers, OPTIMIZERS)
    optimizers = {name: OPTIMIZERS[name] for name in config.optimizers}
    optimizers |= {path.stem: gate_rule(path) for path in config.rule}
    if not config.report:
        run(config, optimizers)
    print(report(config, optimizers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
