"""Loss curves of optimizers on unseen problems, measured once and kept; their tables.

A curve's file is named by a digest of all that decides it: the problem, the data, the
optimizer with its rate or the rule's file, which instances, how many updates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax

from experiments.common.saved_options import to_json
from experiments.common.tables import Table
from experiments.common.tuning import Grid, Tuned, tune
from experiments.learned_optimizer.command_line import rule_files
from experiments.learned_optimizer.options import Config, Problem, Test
from experiments.learned_optimizer.problems import Source, load_source
from experiments.learned_optimizer.what_was_told import told
from metalstm import rules
from metalstm.data.cache import cached
from metalstm.learned_optimizers import curves
from metalstm.plots import Losses
from metalstm.statistics import Estimate, mean_and_ci95

_TUNING_SEED = 2_000_003  # far from the seeds of training, validation and test
_GRID_POINTS = 16
_BETAS = (0.5, 0.8, 0.9, 0.95, 0.99)


Row = dict[str, Any]


class Optimizer(NamedTuple):
    """What is measured: a bound rule, or a baseline at the best point of its grid."""

    name: str
    tx: optax.GradientTransformationExtraArgs
    identity: dict[str, Any]  # JSON that two different optimizers never share
    tuned: Tuned | None = None  # of a baseline
    told: bool = False  # of a rule: the progress and length of training

    @property
    def beta(self) -> float | None:
        return self.tuned.best.get("momentum") if self.tuned else None


class Measured(NamedTuple):
    optimizer: Optimizer
    losses: Losses

    def part(self, which: slice) -> Measured:
        """Some of what was recorded."""
        steps, values = self.losses
        return self._replace(losses=Losses(steps[which], values[:, which]))


def baseline(
    name: str, steps: int
) -> tuple[Callable[..., optax.GradientTransformation], Grid]:
    """Return ``(learning_rate[, momentum]) -> optimizer``, and the grid to tune it on.

    Rates are four to a decade. ``adam-cosine`` has its rate decay to 0 over ``steps``.
    """

    def cosine(learning_rate):
        return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    nesterov = functools.partial(optax.sgd, nesterov=True)
    factory, first_exponent = {
        "sgd": (optax.sgd, -2.75),
        "momentum": (optax.sgd, -3.25),
        "nesterov": (nesterov, -3.25),
        "rmsprop": (optax.rmsprop, -3.5),
        "adam": (optax.adam, -3.0),
        "adamw": (optax.adamw, -3.0),
        "adagrad": (optax.adagrad, -2.5),
        "adadelta": (optax.adadelta, -1.0),
        "adam-cosine": (cosine, -3.0),
    }[name]
    grid = {"learning_rate": 10 ** (first_exponent + np.arange(_GRID_POINTS) / 4)}
    if name in ("momentum", "nesterov"):
        grid["momentum"] = np.array(_BETAS)
    return factory, grid


class Bench:
    """One problem and everything that is measured on it."""

    def __init__(self, problem: Problem, test: Test, folder: Path):
        self.problem, self.test, self.folder = problem, test, folder
        same_test = ("data_dir", "scaling", "scaling_per", "train_image_size")
        what = {k: v for k, v in to_json(problem).items() if k not in same_test}
        self.identity = what | {"eval_batch": test.eval_batch}

    @functools.cached_property
    def source(self) -> Source:
        """Loaded when something must be measured."""
        return load_source(self.problem)

    def losses(
        self, optimizer: Optimizer, *, steps: int, instances: int, every: int = 1
    ) -> Losses:
        """Losses of the test problems, [instances, 1 + steps / every]."""
        settings = {"num_instances": instances, "num_steps": steps}
        settings |= {"record_every": every, "seed": self.test.test_seed}

        def measure() -> dict[str, np.ndarray]:
            print(f"  measuring {optimizer.name}", file=sys.stderr, flush=True)
            source, tx = self.source, optimizer.tx
            values = curves.loss_curves(
                source.test,
                rules.with_progress(tx, steps) if optimizer.told else tx,
                source.data,
                eval_batch=self.test.eval_batch,
                task_mapping=source.task_mapping,
                **settings,
            )
            return {"values": np.asarray(values, np.float32)}

        key = {"optimizer": optimizer.identity, **settings}
        values = self._kept("curve", key, measure)["values"]
        return Losses(np.arange(values.shape[1]) * every, values)

    @property
    def tune_for(self) -> Literal["mean", "mean-log"]:
        by_log = self.problem.name == "quadratics"
        return self.test.tune_for or ("mean-log" if by_log else "mean")

    def tune(self, name: str, *, steps: int) -> Optimizer:
        """Choose rate (and momentum) by the last loss on other problems."""
        factory, grid = baseline(name, steps)
        settings = {"num_instances": self.test.tune_instances, "num_steps": steps}
        settings |= {"seed": _TUNING_SEED + self.test.test_seed}

        def score(grid: Grid) -> np.ndarray:
            tried = curves.sweep(
                self.source.test,
                rules.tunable(factory, **dict.fromkeys(grid, 0.1)),
                {axis: values.tolist() for axis, values in grid.items()},
                self.source.data,
                score="mean_log" if self.tune_for == "mean-log" else "mean",
                record_every=steps,
                eval_batch=self.test.eval_batch,
                task_mapping=self.source.task_mapping,
                **settings,
            )
            return tried.scores.reshape([len(values) for values in grid.values()])

        def search() -> dict[str, np.ndarray]:
            print(f"  tuning {name}", file=sys.stderr, flush=True)
            tuned = tune(score, grid, grow="learning_rate", points=4)
            return tuned.grid | {"scores": tuned.scores}

        key = {"baseline": name, "for": self.tune_for, **settings}
        key["grid"] = {axis: values.tolist() for axis, values in grid.items()}
        found = self._kept("tuning", key, search)
        scores = found.pop("scores")
        tuned = tune(lambda grid: scores, found)
        identity: dict[str, Any] = {"baseline": name, **tuned.best}
        if name == "adam-cosine":
            identity["decay_steps"] = steps
        tx = optax.with_extra_args_support(factory(**tuned.best))
        return Optimizer(name, tx, identity, tuned)

    def _kept(
        self, kind: str, key: dict[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        text = json.dumps(self.identity | key, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        arrays = cached(
            self.folder / f"{kind}-{name}.npz",
            lambda: {"key": np.array(text), **make()},
            remedy="give a folder that can be written with --curves",
        )
        return {k: v for k, v in arrays.items() if k != "key"}


def saved_rules(config: Config, folder: Path) -> list[Optimizer]:
    """The rules of a run, bound, from their files.

    Raises:
      FileNotFoundError: one has not been exported yet.
      ValueError: a file is none of a rule.
    """
    found = []
    for name, given in rule_files(config).items():
        path = given or folder / "rules" / f"{name}.npz"
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} has no trained {name} yet ({path}): resume with --resume "
                f"{folder}, or omit it with --rules"
            )
        saved = rules.load_rule(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        tx, progress, _ = told(saved, progress=False)
        found.append(Optimizer(name, tx, {"rule": digest}, told=progress))
    return found


# -- tables ----------------------------------------------------------------------------


def rows_of(measured: Sequence[Measured], reference: str | None = None) -> list[Row]:
    """One row an optimizer: its losses after the last update.

    The columns are those of `metalstm.learned_optimizers.summary`; differences are
    paired, to ``reference`` (default the first). Logs are
    `metalstm.learned_optimizers.capped_logs`, so that they exist where a problem
    diverges, and no divergence is free.
    """
    values = {one.optimizer.name: one.losses.values for one in measured}
    reference = reference or next(iter(values))
    base, rows = values[reference], []
    for optimizer, losses in measured:
        mine = losses.values
        row: Row = {"optimizer": optimizer.name, "updates": int(losses.steps[-1])}
        row |= {"instances": len(mine), **curves.summary(mine)._asdict()}
        row["mean_log"], row["mean_log_ci95"] = mean_and_ci95(curves.capped_logs(mine))
        if optimizer.name != reference:
            row["log_difference"] = curves.curve_difference(mine, base, log=True)
            if np.isfinite([mine[:, -1], base[:, -1]]).all():
                row["difference"] = curves.curve_difference(mine, base)
        if optimizer.tuned is not None:
            row["rate"] = optimizer.tuned.best["learning_rate"]
            row["inside"] = optimizer.tuned.inside["learning_rate"]
            row["beta"] = optimizer.beta
        rows.append(row)
    return rows


def table(
    rows: Sequence[Row], *, reference: str, caption: str = "", first: str = ""
) -> Table:
    """One line an optimizer; ``first`` names a column to put before the others."""
    columns = {first: f"{{{first}}}"} if first else {}
    columns |= {
        "optimizer": "{optimizer}",
        "updates": "{updates:,}",
        "loss (95% CI)": "{loss}",
        "mean log": "{log:.2f}",
        "median": "{median:.3g}",
        "99%": "{p99:.3g}",
        "diverged": "{diverged}",
        f"loss − {reference}": "{difference:+.3g}",
        f"log-loss − {reference}": "{log_difference:+.2f}",
        "tuned": "rate {rate:.3g}{momentum}{edge}",
    }
    left = (0, 1) if first else (0,)
    return Table.of(caption, columns, map(_for_table, rows), left=left)


def grid(rows: Sequence[Row], *, caption: str) -> Table:
    """Mean losses with their intervals, one row a problem, one column an optimizer."""
    names = dict.fromkeys(row["optimizer"] for row in rows)
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["problem"], dict.fromkeys(names, ""))
        line[row["optimizer"]] = _for_table(row)["loss"]
    cells = [[title, *line.values()] for title, line in lines.items()]
    return Table(caption, ["problem", *names], cells)


def _for_table(row: Row) -> Row:
    # 0%, and no rounding of one problem in a thousand to it
    diverged = f"{100 * row['share_diverged']:.3g}%"
    loss = f"{row['mean']:.3g} ± {row['ci95']:.2g}"
    shown = row | {"log": Estimate(row["mean_log"], row["mean_log_ci95"])}
    shown["diverged"] = diverged
    shown["loss"] = loss if np.isfinite(row["mean"]) else f"{diverged} diverge"
    if "rate" in row:
        shown["momentum"] = "" if row["beta"] is None else f", beta {row['beta']:g}"
        shown["edge"] = "" if row["inside"] else " (at the edge of the grid)"
    return shown
