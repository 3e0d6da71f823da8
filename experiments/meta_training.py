"""Meta-train one method: progress, validation, checkpoints, Ctrl-C, going on."""

from __future__ import annotations

import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

import metalstm
from experiments.config import Config, may_change, to_json
from experiments.run_folder import Metrics
from experiments.sources import Source
from metalstm import checkpoints
from metalstm.base import PyTree
from metalstm.runs import build_algorithm, example_episode
from metalstm.training import FitState, TrainState


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """Ctrl-C came; everything is saved."""


class Programs(NamedTuple):
    """What is compiled once for each method and serves every seed."""

    algorithm: metalstm.MetaAlgorithm
    optimizer: optax.GradientTransformation
    train_loop: Callable[..., Any]
    evaluate: Callable[..., metalstm.Evaluation]


class Trained(NamedTuple):
    params: PyTree  # the best on validation
    episodes: int
    seconds: float  # of meta-training and validation
    episodes_per_second: float  # of meta-training, compilation left out; nan if none
    best_episode: int
    best_mean: float
    best_ci95: float


def make_programs(spec: dict[str, Any], config: Config, source: Source) -> Programs:
    algorithm = build_algorithm(spec)
    budget = config.budget
    first_rate = spec.get("outer_step", budget.learning_rate)
    rate: optax.ScalarOrSchedule = first_rate
    if budget.schedule == "cosine":
        rate = optax.cosine_decay_schedule(first_rate, _num_steps(config))
    elif budget.schedule == "linear":
        rate = optax.linear_schedule(first_rate, 0.0, _num_steps(config))
    optimizer = optax.adam(rate)
    if "outer_step" in spec:
        optimizer = optax.sgd(rate)
    elif budget.clip:
        optimizer = metalstm.adam_clipped(rate, budget.clip)
    train_loop = metalstm.make_train_loop(
        algorithm,
        optimizer,
        source.train,
        num_tasks=budget.meta_batch,
        steps_per_call=budget.steps_per_call,
        accumulate_tasks=budget.accumulate_tasks,
    )
    evaluate = metalstm.make_evaluate(
        algorithm, source.test, batch_size=config.test.test_batch
    )
    return Programs(algorithm, optimizer, train_loop, evaluate)


def meta_train(
    method: str,
    programs: Programs,
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
    session = _Session(method, programs, config, source, folder, metrics)
    with session.progress_bar(), stops_on_ctrl_c() as stop_requested:
        session.run(stop_requested)
    return session.result()


class _Session:
    """The state that the hooks of `metalstm.fit` share."""

    def __init__(self, method, programs, config, source, folder, metrics):
        self.method, self.programs = method, programs
        self.config, self.source = config, source
        self.metrics = metrics
        self.folder = folder / "checkpoints" / method
        self.tasks = config.budget.meta_batch
        self.state, self.history, self.seconds_before = self._start()
        self.started = time.monotonic()
        self.validating = 0.0  # seconds
        self.first_report: tuple[float, float, int] | None = None
        self.bar: Any = None

    def _start(self) -> tuple[FitState, list[dict[str, float]], float]:
        shape, data = self.source.dataset.image_shape, self.config.data
        episode = example_episode(shape, data.way, data.shot)
        make = functools.partial(
            metalstm.init_train_state,
            self.programs.algorithm,
            self.programs.optimizer,
            self.config.run.seed,
            episode,
        )
        if checkpoints.latest(self.folder / "state") is None:
            self.metrics.rewind(self.method, -1)
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
        episode_number = restored.step * self.tasks
        self.metrics.rewind(self.method, episode_number)
        if restored.step < self._num_steps():
            print(f"{self.method}: going on at episode {episode_number:,}")
        saved = restored.metadata
        return restored.state, saved["history"], saved["seconds"]

    def run(self, stop_requested: Callable[[], bool]) -> None:
        budget = self.config.budget
        seconds_left = None
        if budget.minutes is not None:
            seconds_left = 60 * budget.minutes - self.seconds_before
            if seconds_left <= 0:
                return
        latest = self.state.train

        def train_loop(state: TrainState, pool: Any) -> tuple[TrainState, Any]:
            nonlocal latest
            latest = state
            if stop_requested():
                raise Interrupted
            latest, metrics = self.programs.train_loop(state, pool)
            return latest, metrics

        try:
            self.state = metalstm.fit(
                train_loop,
                self.state,
                self.source.dataset.train,
                num_steps=self._num_steps(),
                steps_per_call=budget.steps_per_call,
                validate=self.validate,
                validate_every=self._in_steps(budget.validate_every),
                report=self.report,
                report_every=self._in_steps(max(20, budget.episodes // 2_000)),
                save=self.save,
                save_every=self._in_steps(budget.save_every),
                max_seconds=seconds_left,
            )
        except Interrupted:
            self.save(self.state._replace(train=latest))
            raise

    def validate(self, params: PyTree) -> float:
        begun = time.monotonic()
        result = self.programs.evaluate(
            params,
            self.source.dataset.validation,
            num_episodes=self.config.budget.validation_episodes,
            split="validation",
        )
        episode = self.episode
        row = {"episode": episode, "mean": result.mean, "ci95": result.ci95}
        self.history.append(row)
        values = {"accuracy": result.mean, "ci95": result.ci95}
        self.metrics.write(self.method, "validation", episode, **values)
        self.validating += time.monotonic() - begun
        return result.mean

    def report(self, step: int, means: dict[str, float]) -> None:
        self.episode = step * self.tasks
        now = time.monotonic()
        if self.first_report is None:
            self.first_report = (now, self.validating, self.episode)
        seconds = self.seconds_before + now - self.started
        self.metrics.write(
            self.method, "train", self.episode, seconds=round(seconds, 3), **means
        )
        shown = {"loss": f"{means['loss']:.3f}"}
        if "accuracy" in means:
            shown["acc"] = f"{means['accuracy']:.1%}"
        speed = self.episodes_per_second()
        text = f"{speed:.1f}/s" if math.isfinite(speed) else "compiled"
        for name, value in shown.items():
            text += f"  {name} {value}"
        self.bar.unit = text
        if self.config.budget.minutes is None:
            self.bar.update(self.episode - self.bar.n)
        else:
            # short of the end: a bar beyond its total warns
            self.bar.update(min(seconds, 0.999 * self.bar.total) - self.bar.n)

    def save(self, state: FitState) -> None:
        self.state = state
        metadata = {
            "config": to_json(self.config),
            "history": self.history,
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }
        best = int(state.best_step)
        if math.isfinite(float(state.best_score)) and best != checkpoints.latest(
            self.folder / "best"
        ):
            checkpoints.save(
                self.folder / "best",
                state.best_params,
                step=best,
                metadata={"validation": float(state.best_score)},
                keep=1,
            )
        checkpoints.save(
            self.folder / "state", state, step=int(state.train.step), metadata=metadata
        )

    def result(self) -> Trained:
        saved = checkpoints.read_metadata(self.folder / "state")
        episodes = int(self.state.train.step) * self.tasks
        best_episode = int(self.state.best_step) * self.tasks
        best = next(
            (row for row in self.history if row["episode"] == best_episode),
            {"mean": float(self.state.best_score), "ci95": math.nan},
        )
        return Trained(
            self.state.best_params,
            episodes,
            saved["seconds"],
            self.episodes_per_second(),
            best_episode,
            best["mean"],
            best["ci95"],
        )

    def episodes_per_second(self) -> float:
        if self.first_report is None:
            return math.nan
        begun, validating, episode = self.first_report
        seconds = time.monotonic() - begun - (self.validating - validating)
        if self.episode <= episode or seconds <= 0:
            return math.nan
        return (self.episode - episode) / seconds

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        budget = self.config.budget
        done = int(self.state.train.step) * self.tasks
        self.episode = done
        by_time = budget.minutes is not None
        total = 60 * budget.minutes if by_time else self._num_steps() * self.tasks
        count = "{n:.0f}/{total:.0f} s" if by_time else "{n:,}/{total:,} episodes"
        self.bar = tqdm(
            total=total,
            # tqdm drops a total that is behind it already
            initial=min(round(self.seconds_before, 1), total) if by_time else done,
            desc=f"meta-training {self.method}",
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

    def _num_steps(self) -> int:
        return _num_steps(self.config)

    def _in_steps(self, episodes: int) -> int:
        return _in_steps(episodes, self.config)


def _num_steps(config: Config) -> int:
    if config.budget.minutes is not None:
        # far enough that time decides
        return _in_steps(10**9, config)
    return _in_steps(config.budget.episodes, config)


def _in_steps(episodes: int, config: Config) -> int:
    """Meta-steps for that many episodes, up to a whole jitted call."""
    budget = config.budget
    calls = math.ceil(episodes / (budget.meta_batch * budget.steps_per_call))
    return calls * budget.steps_per_call


@contextmanager
def stops_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) asks to stop at the next step; the second kills."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    try:
        old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals alone
        yield lambda: False
        return
    try:
        yield lambda: requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def curves(rows: list[dict[str, Any]], method: str, kind: str, name: str):
    """A `metalstm.plots.Curve` from rows of metrics.jsonl."""
    from metalstm.plots import Curve

    mine = [r for r in rows if (r["method"], r["kind"]) == (method, kind) and name in r]
    episodes = np.array([row["episode"] for row in mine])
    values = np.array([row[name] for row in mine])
    ci95 = np.array([row.get("ci95", np.nan) for row in mine])
    return Curve(episodes, values, None if kind == "train" else ci95)
