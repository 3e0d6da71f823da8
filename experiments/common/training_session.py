"""What meta-training anything needs: progress, checkpoints, Ctrl-C, going on."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

import metalstm
from experiments.common.run_folder import Metrics
from experiments.common.saved_options import to_json
from metalstm.base import PyTree
from metalstm.meta.training import FitState, TrainState, place_state
from metalstm.runtime import checkpoints, processes, sharding


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """Ctrl-C came; everything is saved."""


class Session:
    """The state that the hooks of `metalstm.fit` share.

    A subclass draws the first state (`start`), trains (`train`, by way of `fit`) and
    scores (`score`). It counts in ``unit``, of which a meta-step makes ``per_step``.
    """

    unit = "meta-step"

    def __init__(
        self,
        name: str,
        config: Any,
        folder: Path,
        metrics: Metrics,
        *,
        num_steps: int,
        may_change: Iterable[str],
        mesh: Mesh | None,
        per_step: int = 1,
    ):
        self.name, self.config, self.metrics = name, config, metrics
        self.folder = folder / "checkpoints" / name
        self.num_steps, self.per_step = num_steps, per_step
        self.may_change, self.mesh = may_change, mesh
        self.history: list[dict[str, float]] = []
        self.seconds_before = 0.0  # of earlier sessions
        self.validating = 0.0  # seconds
        self.first_report: tuple[float, float, int] | None = None
        self.bar: Any = None
        self.state: FitState

    def start(
        self, algorithm: metalstm.MetaAlgorithm, make: Callable[[], TrainState]
    ) -> None:
        """Draw the first state, or take up the newest that was saved."""
        state = self._restored(make) or self._drawn(make)
        train = place_state(algorithm, state.train, self.mesh)
        self.state = state._replace(train=train)
        # `_restored` has seen to it that it is there
        best = int(state.best_step)
        self.saved_best = best if math.isfinite(float(state.best_score)) else None
        self.count = int(self.state.train.step) * self.per_step
        self.started = time.monotonic()

    def _drawn(self, make: Callable[[], TrainState]) -> FitState:
        self.metrics.rewind(self.name, -1)
        return metalstm.init_fit_state(jax.jit(make)())

    def _restored(self, make: Callable[[], TrainState]) -> FitState | None:
        if _latest(self.folder / "state") is None:
            return None
        restored = checkpoints.restore(
            self.folder / "state",
            jax.eval_shape(lambda: metalstm.init_fit_state(make())),
            config=to_json(self.config),
            ignore=self.may_change,
        )
        if restored.message:
            print(f"note: {restored.message}")
        count = restored.step * self.per_step
        self.metrics.rewind(self.name, count)
        if restored.step < self.num_steps:
            print(f"{self.name}: going on at {self.unit} {count:,}")
        self.history = restored.metadata["history"]
        self.seconds_before = restored.metadata["seconds"]
        if not self._has_best(restored.state):
            self._save_best(restored.state)
        return restored.state

    def _has_best(self, state: FitState) -> bool:
        """Whether best/ holds what the state calls the best, and can be read."""
        if not math.isfinite(float(state.best_score)):
            return True  # there is none
        try:
            found = checkpoints.restore(self.folder / "best", state.best_params)
        except (OSError, ValueError):
            return False
        return found.step == int(state.best_step)

    def _save_best(self, state: FitState) -> None:
        checkpoints.save(
            self.folder / "best",
            state.best_params,
            step=int(state.best_step),
            metadata={"validation": float(state.best_score)},
            keep=1,
        )

    def run(self) -> None:
        """Train until the budget is spent.

        Raises:
          Interrupted: after Ctrl-C; the state is saved.
          NonFiniteLossError: the state before the bad step is saved.
        """
        left = self._seconds_left()
        if left is not None and left <= 0:
            return
        with self._progress_bar(), stops_on_ctrl_c() as self.stop_requested:
            self.train()

    def train(self) -> None:
        """Call `fit`, once or for one stage after another."""
        raise AssertionError("a subclass says how")

    def score(self, params: PyTree) -> tuple[float, dict[str, float]]:
        """What validation maximises, and the row of metrics that belongs to it."""
        raise AssertionError("a subclass says how")

    def shown(self, means: dict[str, float]) -> str:
        """What the progress bar says beside the speed."""
        return f"loss {means['loss']:.4g}"

    def fit(
        self,
        train_loop: Callable[..., Any],
        pool: Any,
        *,
        num_steps: int,
        validate_every: int,
        report_every: int,
        save_every: int,
    ) -> None:
        """`metalstm.fit` with this session's hooks; stops and saves on Ctrl-C."""
        latest, step = self.state.train, int(self.state.train.step)
        each = self.config.budget.steps_per_call

        def interruptible(state: TrainState, pool: Any) -> tuple[TrainState, Any]:
            nonlocal latest, step
            latest = state
            if self._must_stop(step, report_every):
                raise Interrupted
            latest, metrics = train_loop(state, pool)
            step += each
            return latest, metrics

        try:
            self.state = metalstm.fit(
                interruptible,
                self.state,
                sharding.place(pool, self.mesh),
                num_steps=num_steps,
                steps_per_call=each,
                validate=self.validate,
                validate_every=validate_every,
                report=self.report,
                report_every=report_every,
                save=self.save,
                save_every=save_every,
                max_seconds=self._seconds_left(),
            )
        except Interrupted:
            self.save(self.state._replace(train=latest))
            raise

    def _must_stop(self, step: int, report_every: int) -> bool:
        if jax.process_count() == 1:
            return self.stop_requested()
        # all must stop at one step, and asking costs: they ask when they report
        asks = step % report_every == 0
        return asks and processes.any_process(self.stop_requested())

    def validate(self, params: PyTree) -> float:
        begun = time.monotonic()
        score, row = self.score(params)
        self.history.append({self.metrics.counter: self.count, **row})
        self.metrics.write(self.name, "validation", self.count, **row)
        self.validating += time.monotonic() - begun
        return score

    def report(self, step: int, means: dict[str, float]) -> None:
        self.count = step * self.per_step
        if self.first_report is None:
            self.first_report = (time.monotonic(), self.validating, self.count)
        seconds = self._seconds()
        row = {"seconds": round(seconds, 3), **means}
        self.metrics.write(self.name, "train", self.count, **row)
        speed = self.speed()
        text = "compiled"
        if math.isfinite(speed):
            text = f"{speed:.1f}/s" if speed >= 10 else f"{speed:.2f}/s"
        self.bar.unit = f"{text}  {self.shown(means)}"
        if self.config.budget.minutes is None:
            self.bar.update(self.count - self.bar.n)
        else:
            # short of the end: a bar beyond its total warns
            self.bar.update(min(seconds, 0.999 * self.bar.total) - self.bar.n)

    def save(self, state: FitState) -> None:
        self.state = state
        best = int(state.best_step)
        if math.isfinite(float(state.best_score)) and best != self.saved_best:
            self._save_best(state)
            self.saved_best = best
        metadata = {
            "config": to_json(self.config),
            "history": self.history,
            "seconds": self._seconds(),
        }
        checkpoints.save(
            self.folder / "state", state, step=int(state.train.step), metadata=metadata
        )

    def saved_seconds(self) -> float:
        """Of meta-training and validation, over all sessions."""
        return checkpoints.read_metadata(self.folder / "state")["seconds"]

    def speed(self) -> float:
        """Units a second, compilation and validation left out; nan before there is."""
        if self.first_report is None:
            return math.nan
        begun, validating, count = self.first_report
        seconds = time.monotonic() - begun - (self.validating - validating)
        if self.count <= count or seconds <= 0:
            return math.nan
        return (self.count - count) / seconds

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _seconds_left(self) -> float | None:
        minutes = self.config.budget.minutes
        return None if minutes is None else 60 * minutes - self.seconds_before

    @contextmanager
    def _progress_bar(self) -> Iterator[None]:
        minutes = self.config.budget.minutes
        by_time = minutes is not None
        total = 60 * minutes if by_time else self.num_steps * self.per_step
        done = round(self.seconds_before, 1) if by_time else self.count
        count = f"{{n:,}}/{{total:,}} {self.unit}s"
        self.bar = tqdm(
            total=total,
            initial=min(done, total),  # tqdm drops a total that is behind it already
            desc=f"meta-training {self.name}",
            bar_format="{desc}  {bar:22}  "
            + ("{n:.0f}/{total:.0f} s" if by_time else count)
            + "  {unit}  eta {remaining}",
            ascii=" #",
            disable=not processes.is_main(),
            unit="compiling",  # the field of the format that tqdm leaves to us
            # a log file gets a line now and then, a terminal a smooth bar
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )
        try:
            yield
        finally:
            self.bar.close()


def _latest(folder: Path) -> int | None:
    """The newest step as process 0 sees it: shared storage may show another late."""
    return json.loads(processes.from_main(json.dumps(checkpoints.latest(folder))))


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
