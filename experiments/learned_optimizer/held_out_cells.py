"""The cells of `held_out`: optimizers, the search of their rates, runs."""

from __future__ import annotations

import glob
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from optax import contrib

from experiments.common.cli import check_names, replace
from experiments.common.run_folder import write_json
from experiments.common.saved_options import read_json
from experiments.learned_optimizer.held_out import Config
from experiments.learned_optimizer.held_out_tasks import TASKS, VERSION, HeldOut, Loaded
from experiments.learned_optimizer.what_was_told import told
from metalstm import rules
from metalstm.learned_optimizers import make_loss_curves
from metalstm.runtime.array_files import digest_of, named_leaves
from metalstm.runtime.files import atomic_write

TRIALS, RATE_TRIALS, MOST_TRIALS = 9, 7, 15
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
    digest: str | None = None  # of a trained rule


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


RULE_SCHEDULES = ("constant", "cosine", "warmup")


FALLBACK = ", fallback"  # ends the name of a row that has no other trials


def gate_rule(path: Path, *, fallback: bool = False) -> Optimizer:
    """A trained rule, told what it was told; its rate multiplies its updates."""
    saved = rules.load_rule(path)
    learned, progress, length = told(saved, progress=True)
    arrays = jax.tree.map(np.asarray, saved.params)

    def make(rate: Any, num_steps: int) -> optax.GradientTransformation:
        by = optax.scale_by_schedule(rate) if callable(rate) else optax.scale(rate)
        tx = rules.with_progress(learned, num_steps) if progress else learned
        return optax.chain(rules.with_fallback(tx) if fallback else tx, by)

    hidden = {} if progress and length else {"told": [progress, length]}
    digest = digest_of(dict(saved.spec) | hidden, named_leaves(arrays))
    return Optimizer(make, 1.0, RULE_SCHEDULES, digest=digest)


class Trial(NamedTuple):
    """A point of the search: rate * sqrt(10)^step with a schedule."""

    step: int
    schedule: str

    def rate(self, optimizer: Optimizer) -> float:
        return optimizer.rate * _FACTOR**self.step


def scheduled(name: str, peak: Any, num_steps: int) -> Any:
    """A rate, or a schedule, of which ``peak`` is the highest."""
    if name == "constant":
        return peak
    shape = optax.cosine_decay_schedule(1, num_steps)
    if name == "warmup":
        warm = num_steps // 20
        shape = optax.warmup_cosine_decay_schedule(0, 1, warm, num_steps)
    return lambda step: peak * shape(step)


def next_trial(schedules: tuple[str, ...], scores: dict[Trial, float]) -> Trial | None:
    """The trial that the search makes after ``scores``, None at its end.

    A function of the scores alone, so that a stopped search resumes. Losses that are
    not finite count as infinite, and among equal scores the smaller rate is the best.
    """
    if len(scores) >= TRIALS:
        return _beyond_the_edge(scores)
    first, *others = schedules
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


def _beyond_the_edge(scores: dict[Trial, float]) -> Trial | None:
    """Where no lower or no higher rate than the best was tried, the next one there."""
    best, steps = best_trial(scores), {trial.step for trial in scores}
    for edge, outwards in ((min(steps), -1), (max(steps), 1)):
        if best.step == edge and len(scores) < MOST_TRIALS:
            return best._replace(step=edge + outwards)
    return None


def best_trial(scores: dict[Trial, float]) -> Trial:
    return min(sorted(scores), key=lambda trial: scores[trial])


def around(trial: Trial) -> list[Trial]:
    """The same at rates over three decades."""
    return [trial._replace(step=trial.step + by) for by in range(-3, 4)]


# -- cells -----------------------------------------------------------------------------


def compiled(
    task: HeldOut, loaded: Loaded, optimizer: Optimizer, schedule: str
) -> Callable[[float, int], dict[str, Any]]:
    """(rate, seed) -> a cell: its losses on EVAL_BATCH examples at 21 equal times."""

    def make(rate: Any) -> optax.GradientTransformation:
        steps = task.num_steps
        return optimizer.make(scheduled(schedule, rate, steps), steps)

    run = make_loss_curves(
        loaded.family,
        rules.tunable(make, rate=optimizer.rate),
        num_instances=1,
        num_steps=task.num_steps,
        record_every=task.num_steps // RECORDS,
        eval_batch=EVAL_BATCH,
        task_mapping="unroll",
        measured=optimizer.averaged,
    )

    def cell(rate: float, seed: int) -> dict[str, Any]:
        started, cpu = time.monotonic(), time.process_time()
        losses = run({"rate": jnp.float32(rate)}, loaded.data, seed)[0]
        return {
            "losses": [float(x) if math.isfinite(x) else None for x in losses],
            "seconds": round(time.monotonic() - started, 1),  # maybe with compilation
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }

    return cell


class Cell(msgspec.Struct):
    """What is read of a cell."""

    losses: Annotated[
        list[float | None], msgspec.Meta(min_length=RECORDS + 1, max_length=RECORDS + 1)
    ]


Runs = dict[tuple[Trial, int], np.ndarray]  # (trial, seed) -> losses [21]


def name_of(trial: Trial, seed: int) -> str:
    return f"{trial.schedule}{trial.step:+d}-seed{seed}"


def from_name(name: str) -> tuple[Trial, int] | None:
    """The inverse of `name_of`, None for other names."""
    if (found := re.fullmatch(r"([a-z]+)([+-]\d+)-seed(\d+)", name)) is None:
        return None
    return Trial(int(found[2]), found[1]), int(found[3])


class Cells:
    """The cells of one task and optimizer, which are files."""

    def __init__(self, folder: Path, task: str, optimizer: str):
        self.folder = folder / f"v{VERSION}" / task / optimizer

    def path(self, trial: Trial, seed: int) -> Path:
        return self.folder / f"{name_of(trial, seed)}.json"

    def read(self) -> Runs:
        """The losses, infinite where not finite.

        Raises:
          ValueError: a cell is damaged.
        """
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            if (which := from_name(path.stem)) is not None:
                cell = read_json(path, Cell, "delete it, and run the test again")
                found[which] = finite(cell.losses)
        return found

    def scores(self) -> dict[Trial, float]:
        """Of the tuning's trials so far."""
        runs = self.read().items()
        return {t: float(run[-1]) for (t, seed), run in runs if seed == TUNE_SEED}


def finite(losses: Iterable[float | None]) -> np.ndarray:
    """JSON's null is an infinite loss."""
    return np.array([np.inf if x is None else x for x in losses], np.float64)


def missing(
    cells: Cells, optimizer: Optimizer, *, sensitivity: bool
) -> Iterator[tuple[Trial, int]]:
    """The (trial, seed) that are to be run, in order; each is run before the next."""
    default, is_rule = Trial(0, optimizer.schedules[0]), optimizer.digest is not None
    if is_rule:  # one trial: the default, nothing tuned
        yield from ((default, s) for s in SEEDS if not cells.path(default, s).exists())
    if cells.folder.name.endswith(FALLBACK):
        return
    while (trial := next_trial(optimizer.schedules, cells.scores())) is not None:
        yield trial, TUNE_SEED
    best = best_trial(cells.scores())
    yield from ((best, s) for s in SEEDS if not cells.path(best, s).exists())
    if sensitivity:
        for trial in around(default if is_rule else best):
            if not cells.path(trial, SEEDS[0]).exists():
                yield trial, SEEDS[0]


def resolved(config: Config) -> tuple[Config, dict[str, Optimizer]]:
    """Name all tasks where none is; and the optimizers with the rules' rows.

    Raises:
      ValueError: there is no such task or optimizer, or a rule's name is taken.
    """
    check_names("--tasks", config.tasks, TASKS)
    check_names("--optimizers", config.optimizers, OPTIMIZERS)
    chosen = config.optimizers or tuple(OPTIMIZERS)
    optimizers = {name: OPTIMIZERS[name] for name in chosen}
    for path in config.rule:
        if path.stem in {**OPTIMIZERS, **optimizers}:
            raise ValueError(
                f"--rule {path}: another row is called {path.stem}; rename the file"
            )
        optimizers[path.stem] = gate_rule(path)
        if config.fallback:
            optimizers[path.stem + FALLBACK] = gate_rule(path, fallback=True)
    return replace(config, tasks=config.tasks or tuple(TASKS)), optimizers


def claim_name(folder: Path, name: str, digest: str) -> None:
    """Note of which rule the cells of this name are.

    Raises:
      ValueError: they are of another one.
    """
    cells = folder / f"v{VERSION}"
    path = cells / f"{name}.sha256"
    begun = any(cells.glob(f"*/{glob.escape(name)}/*.json"))
    # cells of earlier versions have no such note
    if begun and path.exists() and path.read_text() != digest:
        raise ValueError(
            f"--rule: {folder} has cells of another rule called {name}; rename the "
            "file, or choose another --folder"
        )
    cells.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(digest)


def run(config: Config, optimizers: dict[str, Optimizer]) -> None:
    """Run every missing cell, one task after another.

    Raises:
      ValueError: a cell is damaged, or of another rule of the same name.
    """
    for name, optimizer in optimizers.items():
        if optimizer.digest is not None:
            claim_name(config.folder, name, optimizer.digest)
    for task_name in config.tasks:
        task, loaded = TASKS[task_name], None
        for name, optimizer in optimizers.items():
            cells = Cells(config.folder, task_name, name)
            programs: dict[str, Callable] = {}  # by their schedule
            left = missing(cells, optimizer, sensitivity=config.sensitivity)
            for trial, seed in left:
                loaded = loaded or task.load(config.data_dir)
                if (how := trial.schedule) not in programs:
                    programs[how] = compiled(task, loaded, optimizer, how)
                cell = programs[how](trial.rate(optimizer), seed)
                cell |= trial._asdict() | {"seed": seed, "jax": jax.__version__}
                path = cells.path(trial, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, cell)
                last = finite(cell["losses"])[-1]
                print(f"{task_name} {path.stem} of {name}: {last:.4g}", flush=True)
        jax.clear_caches()
