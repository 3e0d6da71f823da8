"""Meta-training anything: `metalstm.fit` with hooks that report, save and stop.

The caller makes a `Loop`, which draws the first state or resumes the newest, and calls
`Loop.fit` once for each train loop, within `Loop.running`:

    loop = Loop(setup, folder, metrics, algorithm, make_state)
    with loop.running():
        loop.fit(train_loop, pool)
    params = loop.state.best_params
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import metalstm
from experiments.common.progress import ProgressBar, Stopwatch
from experiments.common.run_folder import Metrics
from experiments.common.saved_training import SavedTraining
from experiments.common.script_end import Interrupted, stops_on_ctrl_c
from metalstm.base import PyTree
from metalstm.meta.fitting import Call, FitState, Stepped, drive, fit_steps
from metalstm.meta.step import TrainState, place_state
from metalstm.runtime import processes, sharding

__all__ = ["Interrupted", "Loop", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What is meta-trained, for how long, and how it is scored."""

    name: str  # of its checkpoints and its rows of metrics
    config: Any  # what a checkpoint must have been saved with
    may_change: Iterable[str]  # ... but for these of its options
    num_steps: int
    minutes: float | None  # of all sessions; num_steps is then far away
    # meta-steps
    steps_per_call: int
    validate_every: int
    report_every: int
    save_every: int
    # what validation maximises, and the row of metrics that belongs to it
    score: Callable[[PyTree], tuple[float, dict[str, float]]]
    # what the progress bar says of the mean metrics
    describe: Callable[[dict[str, float]], str]
    unit: str = "meta-step"  # what is counted, in metrics too
    per_step: int = 1  # so many of these
    mesh: Mesh | None = None


class Loop:
    """A meta-training under way; without an algorithm, on one device.

    Raises:
      ConfigMismatch: the newest checkpoint was saved with another config.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        metrics: Metrics,
        algorithm: metalstm.MetaAlgorithm | None,
        make_state: Callable[[], TrainState],
    ):
        self.setup, self.metrics = setup, metrics
        where = folder / "checkpoints" / setup.name
        self.saved = SavedTraining(where, setup.config, setup.may_change)
        resumed = self.saved.restore(make_state)
        self.history: list[dict[str, float]] = []
        self._seconds_before = 0.0  # of earlier sessions
        if resumed is None:
            metrics.rewind(setup.name, -1)
            state = metalstm.init_fit_state(jax.jit(make_state)())
        else:
            state, self.history, self._seconds_before = resumed
            count = int(state.train.step) * setup.per_step
            metrics.rewind(setup.name, count)
            if int(state.train.step) < setup.num_steps:
                print(f"{setup.name}: resuming at {setup.unit} {count:,}")
        train = state.train
        if algorithm is not None:
            train = place_state(algorithm, train, setup.mesh)
        self.state = state._replace(train=train)
        self.count = int(train.step) * setup.per_step
        self.stopwatch = Stopwatch()
        self._started = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show progress, and stop and save on Ctrl-C."""
        setup, in_seconds = self.setup, self.setup.minutes is not None
        self._bar = ProgressBar(
            setup.name,
            setup.unit,
            total=60 * setup.minutes  # type: ignore[operator]
            if in_seconds
            else setup.num_steps * setup.per_step,
            done=round(self._seconds_before, 1) if in_seconds else self.count,
            in_seconds=in_seconds,
        )
        try:
            with stops_on_ctrl_c() as self._stop_requested:
                yield
        finally:
            self._bar.close()

    def fit(
        self, train_loop: Callable[..., Any], pool: Any, until: int | None = None
    ) -> None:
        """Train to the step ``until``, or until the budget is spent.

        Raises:
          Interrupted: after Ctrl-C; the state is saved.
          NonFiniteLossError: the state before the bad step is saved.
        """
        drive(self.steps(train_loop, pool, until))

    def steps(
        self, train_loop: Callable[..., Any], pool: Any, until: int | None = None
    ) -> Generator[Call, Stepped, None]:
        """`fit` as a generator, see `metalstm.meta.fitting.fit_steps`.

        Raises:
          Interrupted: after Ctrl-C; the state is saved.
          NonFiniteLossError: the state before the bad step is saved.
        """
        setup = self.setup
        left = None
        if setup.minutes is not None:
            left = 60 * setup.minutes - self._seconds_before
            if left <= 0:
                return
        self.state = yield from fit_steps(
            train_loop,
            self.state,
            sharding.place(pool, setup.mesh),
            num_steps=min(until or setup.num_steps, setup.num_steps),
            steps_per_call=setup.steps_per_call,
            validate=self._validate,
            validate_every=setup.validate_every,
            report=self._report,
            report_every=setup.report_every,
            save=self._save,
            save_every=setup.save_every,
            max_seconds=left,
            stop=self._stop_requested,
        )
        if processes.any_process(self._stop_requested()):
            raise Interrupted

    def _validate(self, params: PyTree) -> float:
        with self.stopwatch.excluding():
            score, row = self.setup.score(params)
        self.history.append({self.metrics.counter: self.count, **row})
        self.metrics.write(self.setup.name, "validation", self.count, **row)
        return score

    def _report(self, step: int, means: dict[str, float]) -> None:
        self.count = step * self.setup.per_step
        self.stopwatch.report(self.count)
        seconds = self._seconds()
        row = {"seconds": round(seconds, 3), **means}
        self.metrics.write(self.setup.name, "train", self.count, **row)
        self._bar.update(
            self.count if self.setup.minutes is None else seconds,
            self.stopwatch.speed(),
            self.setup.describe(means),
        )

    def _save(self, state: FitState) -> None:
        self.state = state
        self.saved.save(state, self.history, self._seconds())

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
