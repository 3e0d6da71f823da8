"""Loss curves of optimizers on unseen problems, measured once and kept.

A curve's file is named by a digest of all that decides it: the problem, the data, the
optimizer with its rate or the rule's file, which instances, how many updates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax

from experiments.learned_optimizer.baselines import baseline
from experiments.learned_optimizer.options import Problem, Test
from experiments.learned_optimizer.problems import NEED_NO_DATA, Source, load_source
from metalstm import rules
from metalstm.data.cache import cached
from metalstm.learned_optimizers import curves
from metalstm.plots import Losses, Sweep
from metalstm.tasks import TaskMapping

_TUNING_SEED = 2_000_003  # far from the seeds of training, validation and test
_WIDENINGS = 4  # how often a grid may grow at the end where its best lies


class Optimizer(NamedTuple):
    """What is measured: a bound rule or a tuned baseline."""

    name: str
    tx: optax.GradientTransformationExtraArgs
    identity: dict[str, Any]  # JSON that two different optimizers never share
    learned: bool


class Tuned(NamedTuple):
    optimizer: Optimizer
    rate: float
    beta: float | None
    inside: bool  # neither end of the grid of rates
    sweep: Sweep  # at the best beta


class Bench:
    """One problem and everything that is measured on it."""

    def __init__(self, problem: Problem, test: Test, folder: Path):
        self.problem, self.test, self.folder = problem, test, folder
        what = asdict(problem)
        for name in ("data_dir", "scaling", "scaling_per", "train_image_size"):
            del what[name]
        self.identity = what | {"eval_batch": test.eval_batch}

    @functools.cached_property
    def source(self) -> Source:
        """Loaded when something must be measured."""
        return load_source(self.problem)

    def losses(
        self, optimizer: Optimizer, *, steps: int, instances: int, every: int = 1
    ) -> Losses:
        """Losses of the test problems, [instances, 1 + steps / every]."""
        key = self.identity | {
            "optimizer": optimizer.identity,
            "steps": steps,
            "instances": instances,
            "every": every,
            "seed": self.test.test_seed,
        }

        def measure() -> dict[str, np.ndarray]:
            print(f"  measuring {optimizer.name}", file=sys.stderr, flush=True)
            values = curves.loss_curves(
                self.source.test,
                optimizer.tx,
                self.source.data,
                num_instances=instances,
                num_steps=steps,
                seed=self.test.test_seed,
                record_every=every,
                eval_batch=self.test.eval_batch,
                task_mapping=self.mapping,
            )
            return {"values": np.asarray(values, np.float32)}

        values = self._kept("curve", key, measure)["values"]
        return Losses(np.arange(values.shape[1]) * every, values)

    def tune(self, name: str, *, steps: int) -> Tuned:
        """Choose rate (and momentum) by the last loss on other problems."""
        settings = baseline(name, steps)
        test = self.test
        key = self.identity | {
            "baseline": name,
            "steps": steps,
            "instances": test.tune_instances,
            "seed": _TUNING_SEED + test.test_seed,
            "for": self.tune_for,
            "grid": [settings.grid().tolist(), settings.betas],
        }
        found = self._kept("tuning", key, lambda: self._sweep(name, steps))
        rates, scores = found["rates"], found["scores"]  # [R], [R, betas]
        best, column = np.unravel_index(np.argmin(scores), scores.shape)
        rate, options = float(rates[best]), {}
        beta = settings.betas[column] if settings.betas else None
        if beta is not None:
            options["momentum"] = beta
        tx = optax.with_extra_args_support(settings.factory(rate, **options))
        identity = {"baseline": name, "rate": rate, "beta": beta}
        if name == "adam-cosine":
            identity["decay_steps"] = steps
        return Tuned(
            Optimizer(name, tx, identity, False),
            rate,
            beta,
            inside=bool(0 < best < len(rates) - 1),
            sweep=Sweep(rates, scores[:, column]),
        )

    @property
    def tune_for(self) -> Literal["mean", "mean-log"]:
        by_log = self.problem.problem == "quadratics"
        return self.test.tune_for or ("mean-log" if by_log else "mean")

    def _sweep(self, name: str, steps: int) -> dict[str, np.ndarray]:
        """Rates [R] ascending, and scores [R, betas]."""
        print(f"  tuning {name}", file=sys.stderr, flush=True)
        rates = baseline(name, steps).grid()
        scores = self._scores(name, rates, steps)
        for _ in range(_WIDENINGS):
            best = int(np.argmin(scores.min(1)))
            if 0 < best < len(rates) - 1:
                break
            more = 10 ** (np.arange(1, 5) / 4)
            more = rates[0] / more[::-1] if best == 0 else rates[-1] * more
            at = 0 if best == 0 else len(rates)
            rates = np.insert(rates, at, more)
            scores = np.insert(scores, at, self._scores(name, more, steps), axis=0)
        return {"rates": rates, "scores": scores}

    def _scores(self, name: str, rates: np.ndarray, steps: int) -> np.ndarray:
        settings = baseline(name, steps)
        grid: dict[str, Sequence[float]] = {"learning_rate": rates.tolist()}
        if settings.betas:
            grid["momentum"] = settings.betas
        tunable = rules.tunable(settings.factory, **dict.fromkeys(grid, 0.1))
        tried = curves.sweep(
            self.source.test,
            tunable,
            grid,
            self.source.data,
            num_instances=self.test.tune_instances,
            num_steps=steps,
            seed=_TUNING_SEED + self.test.test_seed,
            score="mean_log" if self.tune_for == "mean-log" else "mean",
            record_every=steps,
            eval_batch=self.test.eval_batch,
            task_mapping=self.mapping,
        )
        return tried.scores.reshape(len(rates), -1)

    @property
    def mapping(self) -> TaskMapping | None:
        """Small problems all at once; networks one by one, where they stay in cache."""
        return "vmap" if self.problem.problem in NEED_NO_DATA else None

    def _kept(
        self, kind: str, key: dict[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        text = json.dumps(key, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        arrays = cached(
            self.folder / f"{kind}-{name}.npz",
            lambda: {"key": np.array(text), **make()},
            remedy="give a folder that can be written with --curves",
        )
        return {k: v for k, v in arrays.items() if k != "key"}


def load_optimizers(paths: dict[str, Path]) -> list[Optimizer]:
    """Bind saved rules; raises ValueError for a file that is none."""
    found = []
    for name, path in paths.items():
        saved = rules.load_rule(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(Optimizer(name, saved.transform(), {"rule": digest}, True))
    return found


def compete(
    bench: Bench,
    learned: Sequence[Optimizer],
    names: Sequence[str],
    *,
    steps: int,
    instances: int,
    every: int = 1,
    tune_steps: int | None = None,
) -> tuple[dict[str, Losses], dict[str, Tuned]]:
    """Measure rules and tuned baselines on the same problems."""
    tuned = {name: bench.tune(name, steps=tune_steps or steps) for name in names}
    optimizers = [*learned, *(t.optimizer for t in tuned.values())]
    measured = {
        o.name: bench.losses(o, steps=steps, instances=instances, every=every)
        for o in optimizers
    }
    return measured, tuned
