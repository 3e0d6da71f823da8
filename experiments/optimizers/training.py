"""Meta-train one rule: progress, validation, checkpoints, Ctrl-C, going on."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import metalstm
from experiments.config import to_json
from experiments.meta_training import Interrupted, stops_on_ctrl_c
from experiments.optimizers.config import Config, Stage, may_change, stages
from experiments.optimizers.problems import NEED_NO_DATA, Source
from experiments.optimizers.tables import capped_logs
from experiments.run_folder import Metrics
from metalstm import algorithms, checkpoints, optimizer_curves, problems
from metalstm.base import PyTree, UpdateRule
from metalstm.training import FitState, TrainState

_VALIDATION_SEED = 1_000_003  # far from the seeds of training, tuning and test
_FOREVER = 10**9  # meta-steps: time decides


class Trained(NamedTuple):
    params: PyTree  # the best on validation
    meta_steps: int
    seconds: float  # of meta-training and validation, over all sessions
    best_step: int
    validation: float  # mean log-loss after the last update


def meta_train(
    name: str,
    rule: UpdateRule,
    config: Config,
    source: Source,
    folder: Path,
    metrics: Metrics,
) -> Trained:
    """Train, or go on training, until the budget is spent.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
      NonFiniteLossError: the state before the bad step is saved.
    """
    session = _Session(name, rule, config, source, folder, metrics)
    with session.progress_bar(), stops_on_ctrl_c() as stop_requested:
        session.run(stop_requested)
    return session.result()


def _horizon(config: Config, stage: Stage) -> int | Callable[[jax.Array], jax.Array]:
    """The horizon, or how it grows with the meta-step: doubling, in equal shares."""
    budget = config.budget
    if stage.end < budget.meta_steps or budget.first_horizon in (None, budget.horizon):
        return stage.horizon
    horizons = [budget.first_horizon]
    while horizons[-1] < budget.horizon:
        doubled = min(2 * horizons[-1], budget.horizon)
        horizons.append(doubled // budget.unroll * budget.unroll)
    lengths = np.array(horizons, np.int32)
    # the carry counts meta-steps from the start of the stage
    each = max((stage.end - stage.start) // (2 * len(horizons)), 1)
    return lambda step: jnp.asarray(lengths)[
        jnp.minimum(jnp.asarray(step) // each, len(horizons) - 1)
    ]


def _algorithm(
    rule: UpdateRule, config: Config, source: Source, stage: Stage
) -> metalstm.MetaAlgorithm:
    budget = config.budget
    weights = None
    if budget.weights == "linear":
        weights = lambda step: 2 * step / stage.horizon  # noqa: E731
    return algorithms.learned_optimizer(
        source.training,
        rule,
        num_tasks=budget.tasks,
        unroll_steps=stage.unroll,
        horizon=_horizon(config, stage),
        second_order=budget.second_order,
        weights=weights,
        loss_transform=budget.loss_transform,
        estimator=budget.estimator,
        pes_std=budget.pes_std,
        stagger=budget.stagger,
    )


def _optimizer(config: Config) -> optax.GradientTransformation:
    budget = config.budget
    rate: optax.ScalarOrSchedule = budget.learning_rate
    if budget.schedule == "cosine":
        rate = optax.cosine_decay_schedule(budget.learning_rate, budget.meta_steps)
    if budget.clip:
        return metalstm.adam_clipped(rate, budget.clip)
    return optax.adam(rate)


class _Session:
    """The state that the hooks of `metalstm.fit` share."""

    def __init__(self, name, rule, config, source, folder, metrics):
        self.name, self.rule, self.config, self.source = name, rule, config, source
        self.metrics = metrics
        self.folder = folder / "checkpoints" / name
        budget = config.budget
        self.stages = stages(config)
        if budget.minutes is not None:
            self.stages = [Stage(budget.unroll, budget.horizon, 0, _FOREVER)]
        calls = self.stages[-1].end // budget.steps_per_call
        self.num_steps = calls * budget.steps_per_call
        self.sampler = problems.ProblemSampler(source.training, budget.unroll + 1)
        self.optimizer = _optimizer(config)
        self.state, self.history, self.seconds_before = self._start()
        self.started = time.monotonic()
        self.first_report: tuple[float, int] | None = None
        self.bar: Any = None

    def _start(self) -> tuple[FitState, list[dict[str, float]], float]:
        draw = self.sampler.sample(jax.random.key(0), self.source.training_data)
        algorithm = _algorithm(self.rule, self.config, self.source, self.stages[0])
        make = functools.partial(
            metalstm.init_train_state,
            algorithm,
            self.optimizer,
            self.config.run.seed,
            draw,
        )
        if checkpoints.latest(self.folder / "state") is None:
            self.metrics.rewind(self.name, -1)
            return metalstm.init_fit_state(jax.jit(make)()), [], 0.0
        target = jax.eval_shape(lambda: metalstm.init_fit_state(make()))
        restored = checkpoints.restore(
            self.folder / "state",
            target,
            config=to_json(self.config),
            ignore=may_change(self.config),
        )
        if restored.message:
            print(f"note: {restored.message}")
        self.metrics.rewind(self.name, restored.step)
        if restored.step < self.num_steps:
            print(f"{self.name}: going on at meta-step {restored.step:,}")
        saved = restored.metadata
        return restored.state, saved["history"], saved["seconds"]

    def run(self, stop_requested: Callable[[], bool]) -> None:
        minutes = self.config.budget.minutes
        seconds_left = None
        if minutes is not None:
            seconds_left = 60 * minutes - self.seconds_before
            if seconds_left <= 0:
                return
        for stage in self.stages:
            if int(self.state.train.step) < stage.end:
                self._run_stage(stage, stop_requested, seconds_left)

    def _run_stage(
        self,
        stage: Stage,
        stop_requested: Callable[[], bool],
        seconds_left: float | None,
    ) -> None:
        budget = self.config.budget
        algorithm = _algorithm(self.rule, self.config, self.source, stage)
        if int(self.state.train.step) == stage.start:
            self._begin(algorithm, stage)
        compiled = metalstm.make_train_loop(
            algorithm,
            self.optimizer,
            self.sampler,
            num_tasks=budget.tasks,
            steps_per_call=budget.steps_per_call,
        )
        latest = self.state.train

        def train_loop(state: TrainState, data: Any) -> tuple[TrainState, Any]:
            nonlocal latest
            latest = state
            if stop_requested():
                raise Interrupted
            latest, metrics = compiled(state, data)
            return latest, metrics

        every = budget.steps_per_call
        often = max(budget.meta_steps // 500 // every, 1) * every
        try:
            self.state = metalstm.fit(
                train_loop,
                self.state,
                self.source.training_data,
                num_steps=min(stage.end, self.num_steps),
                steps_per_call=every,
                validate=self.validate,
                validate_every=budget.validate_every,
                report=self.report,
                report_every=often,
                save=self.save,
                save_every=budget.save_every,
                max_seconds=seconds_left,
            )
        except Interrupted:
            self.save(self.state._replace(train=latest))
            raise

    def _begin(self, algorithm: metalstm.MetaAlgorithm, stage: Stage) -> None:
        """Start every problem afresh; going on from a checkpoint here does the same."""
        key = jax.random.fold_in(jax.random.key(self.config.run.seed), stage.start)
        draw = self.sampler.sample(key, self.source.training_data)
        train = self.state.train
        carry = algorithm.init_carry(key, train.params, draw)
        # copies: a train step donates its state, which may hold no buffer twice
        train = train._replace(carry=jax.tree.map(jnp.array, carry))
        self.state = self.state._replace(train=train)

    @functools.cached_property
    def _curves(self) -> Callable[[PyTree, Any, int], np.ndarray]:
        test = self.config.test
        kind = self.config.problem.problem
        return optimizer_curves.make_loss_curves(
            self.source.test,
            self.rule,
            num_instances=self.config.budget.validation_instances,
            num_steps=test.steps,
            record_every=test.steps,
            eval_batch=test.eval_batch,
            task_mapping="vmap" if kind in NEED_NO_DATA else None,
        )

    def validate(self, params: PyTree) -> float:
        """Minus the mean log of the last loss, a divergence at its cap."""
        losses = self._curves(params, self.source.data, _VALIDATION_SEED)
        logs = capped_logs(losses, -1)
        mean = float(logs.mean())
        ci95 = float(1.96 * logs.std(ddof=1) / len(logs) ** 0.5)
        self.history.append({"step": self.step, "log_loss": mean, "ci95": ci95})
        self.metrics.write(self.name, "validation", self.step, log_loss=mean, ci95=ci95)
        return -mean

    def report(self, step: int, means: dict[str, float]) -> None:
        self.step = step
        now = time.monotonic()
        if self.first_report is None:
            self.first_report = (now, step)
        seconds = self.seconds_before + now - self.started
        self.metrics.write(self.name, "train", step, seconds=round(seconds, 3), **means)
        begun, first = self.first_report
        speed = (
            f"{(step - first) / (now - begun):.2f}/s" if step > first else "compiled"
        )
        self.bar.unit = f"{speed}  loss {means['loss']:.4g}"
        if self.config.budget.minutes is None:
            self.bar.update(step - self.bar.n)
        else:
            # short of the end: a bar beyond its total warns
            self.bar.update(min(seconds, 0.999 * self.bar.total) - self.bar.n)

    def save(self, state: FitState) -> None:
        self.state = state
        best = int(state.best_step)
        if math.isfinite(float(state.best_score)) and best != checkpoints.latest(
            self.folder / "best"
        ):
            checkpoints.save(self.folder / "best", state.best_params, step=best, keep=1)
        metadata = {
            "config": to_json(self.config),
            "history": self.history,
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }
        checkpoints.save(
            self.folder / "state", state, step=int(state.train.step), metadata=metadata
        )

    def result(self) -> Trained:
        saved = checkpoints.read_metadata(self.folder / "state")
        return Trained(
            self.state.best_params,
            int(self.state.train.step),
            saved["seconds"],
            int(self.state.best_step),
            -float(self.state.best_score),
        )

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        budget = self.config.budget
        self.step = int(self.state.train.step)
        by_time = budget.minutes is not None
        total = 60 * budget.minutes if by_time else self.num_steps
        count = "{n:.0f}/{total:.0f} s" if by_time else "{n:,}/{total:,} meta-steps"
        self.bar = tqdm(
            total=total,
            # tqdm drops a total that is behind it already
            initial=min(round(self.seconds_before, 1), total) if by_time else self.step,
            desc=f"meta-training {self.name}",
            bar_format="{desc}  {bar:22}  " + count + "  {unit}  eta {remaining}",
            ascii=" #",
            unit="compiling",  # the field of the format that tqdm leaves to us
            # a log file gets a line now and then, a terminal a smooth bar
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )
        try:
            yield
        finally:
            self.bar.close()
