"""The loop around meta-steps: reports, validation, the best so far, saving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import Array, PyTree
from metalstm.meta.step import TrainState
from metalstm.meta.warning_signs import WarningSigns
from metalstm.runtime import processes, sharding

__all__ = [
    "Call",
    "FitState",
    "NonFiniteLossError",
    "drive",
    "fit",
    "fit_steps",
    "init_fit_state",
]

Stepped = tuple[TrainState, dict[str, Array]]
TrainLoop = Callable[[TrainState, Any], Stepped]
Returned = TypeVar("Returned")

_PART = 1_000_000  # numbers of an array that are looked at together
_MOST_WAITING = 64  # calls of the loop whose metrics nobody has read


class NonFiniteLossError(FloatingPointError):
    """The meta-loss or its gradient became NaN or infinite; ``.step`` says when."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"the meta-loss or its gradient is not finite at step {step} (loss "
            f"{loss}); the state before that step is kept: lower the "
            "learning rate or the inner step size, clip gradients more tightly, or "
            "look for labels outside [0, way)"
        )
        self.step = step


class Call(NamedTuple):
    """A call of a train loop that `fit_steps` asks for."""

    train_loop: TrainLoop
    state: TrainState
    pool: Any

    def __call__(self) -> Stepped:
        return self.train_loop(self.state, self.pool)


class FitState(NamedTuple):
    """What a checkpoint holds: where training is, and the best of it so far."""

    train: TrainState
    best_params: PyTree
    best_score: Array  # float32, -inf before the first validation
    best_step: Array  # int32


def init_fit_state(state: TrainState) -> FitState:
    """Nothing validated yet. Parameters are copied: a train step donates its own."""
    copy = jax.tree.map(jnp.array, state.params)
    return FitState(state, copy, jnp.float32(-jnp.inf), jnp.int32(0))


def fit(
    train_loop: TrainLoop,
    state: FitState,
    pool: Any,
    *,
    num_steps: int,
    steps_per_call: int = 1,
    validate: Callable[[PyTree], float] | None = None,
    validate_every: int = 0,
    report: Callable[[int, dict[str, float]], None] | None = None,
    report_every: int = 1,
    save: Callable[[FitState], None] | None = None,
    save_every: int = 0,
    max_seconds: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitState:
    """Run ``train_loop`` until ``num_steps`` meta-steps are done.

    Cadences count absolute steps, so a resumed run validates and saves where the
    uninterrupted one does.

    Args:
      train_loop: from `make_train_loop`, with the same ``steps_per_call``.
      num_steps: 0 validates and saves what training would start from.
      validate: meta-parameters -> score, higher is better; the best are kept.
      validate_every, report_every, save_every: in meta-steps, multiples of
        ``steps_per_call``; 0 is never (validation and saving also happen at the end).
      report: (step, mean metrics since the last report), for a logger of one's own,
        such as ``lambda step, means: wandb.log(means, step=step)``.
      save: gets the whole state.
      max_seconds: stop after this long; the end is then validated and saved as usual.
        Several processes agree on it when they report.
      stop: asked before each call; True saves the state as it is and returns it.
        Several processes agree on it likewise.

    Warns:
      RuntimeWarning: once for each sign that training goes wrong: inner loops or
        learned optimizers that diverge, an accuracy that is at the end where it began.

    Raises:
      NonFiniteLossError: names the step, at most 64 calls of ``train_loop`` after it;
        the state before it has been saved.
      ValueError: a cadence is not a multiple of ``steps_per_call``, or the pool holds
        values that are NaN or infinite.
    """
    return drive(
        fit_steps(
            train_loop,
            state,
            pool,
            num_steps=num_steps,
            steps_per_call=steps_per_call,
            validate=validate,
            validate_every=validate_every,
            report=report,
            report_every=report_every,
            save=save,
            save_every=save_every,
            max_seconds=max_seconds,
            stop=stop,
        )
    )


def drive(calls: Generator[Call, Stepped, Returned]) -> Returned:
    """Make each call that a generator asks for, and return what it returns."""
    try:
        call = next(calls)
        while True:
            call = calls.send(call())
    except StopIteration as end:
        returned: Returned = end.value
        return returned


def fit_steps(
    train_loop: TrainLoop,
    state: FitState,
    pool: Any,
    *,
    num_steps: int,
    steps_per_call: int = 1,
    validate: Callable[[PyTree], float] | None = None,
    validate_every: int = 0,
    report: Callable[[int, dict[str, float]], None] | None = None,
    report_every: int = 1,
    save: Callable[[FitState], None] | None = None,
    save_every: int = 0,
    max_seconds: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> Generator[Call, Stepped, FitState]:
    """`fit` as a generator, so that calls of several can be made at once.

    It yields each `Call`, is sent what the call returns, and returns what `fit` does.
    Arguments and errors are those of `fit`.
    """
    cadences = {
        "num_steps": num_steps,
        "validate_every": validate_every,
        "report_every": report_every,
        "save_every": save_every,
    }
    for name, value in cadences.items():
        if value % steps_per_call:
            raise ValueError(
                f"{name}={value} is not a multiple of steps_per_call={steps_per_call}"
            )
    _refuse_not_finite(pool)
    started = time.monotonic()
    step = int(state.train.step)
    pending = _Metrics()

    def flush() -> None:
        pending.read(step)
        means = pending.means()
        if report is not None and means:
            report(step, means)

    def must_stop(wants: bool) -> bool:
        if jax.process_count() == 1:
            return wants
        # clocks differ and asking costs: at every report all stop if one must
        every = report_every or steps_per_call
        return step % every == 0 and processes.any_process(wants)

    def time_is_over() -> bool:
        if max_seconds is None:
            return False
        return must_stop(time.monotonic() - started > max_seconds)

    def keep(validated: bool) -> None:
        nonlocal state
        if validated and validate is not None:
            state = _validated(state, validate)
        if save is not None:
            save(state)

    if num_steps == 0:
        keep(validated=True)
    try:
        while step < num_steps:
            if stop is not None and must_stop(stop()):
                keep(validated=False)
                break
            train, metrics = yield Call(train_loop, state.train, pool)
            state = state._replace(train=train)
            sharding.block_on_cpu_collectives(metrics)
            step += steps_per_call
            pending.add(metrics, step)
            done = step >= num_steps or time_is_over()
            validates = done or (bool(validate_every) and step % validate_every == 0)
            saves = done or (bool(save_every) and step % save_every == 0)
            if validates or saves or (bool(report_every) and step % report_every == 0):
                flush()
            if validates or saves:
                keep(validates)
            if done:
                pending.signs.look_at_end()
                break
    except NonFiniteLossError:
        keep(validated=False)
        raise
    return state


def _refuse_not_finite(pool: Any) -> None:
    """Name the data, before a loss that is NaN blames the learning rate."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(pool)[0]:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            continue
        parts = [leaf]
        if isinstance(leaf, np.ndarray):  # of which the device may not hold all
            parts = np.array_split(leaf, leaf.size // _PART + 1)
        bad = sum(int(jnp.sum(~jnp.isfinite(part))) for part in parts)
        if bad:
            raise ValueError(
                f"pool{jax.tree_util.keystr(path)} holds {bad} values that are NaN or "
                "infinite: remove or replace them"
            )


def _validated(state: FitState, validate: Callable[[PyTree], float]) -> FitState:
    score = float(validate(state.train.params))
    if not score > float(state.best_score):
        return state
    copy = jax.tree.map(jnp.array, sharding.local(state.train.params))
    return state._replace(
        best_params=copy,
        best_score=jnp.float32(score),
        best_step=jnp.int32(int(state.train.step)),
    )


class _Metrics:
    """Means over the steps since the last report, of which few wait on the device."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Array]] = []
        self._sums: dict[str, float] = {}
        self._num_steps = 0
        self.signs = WarningSigns()

    def add(self, metrics: dict[str, Array], step: int) -> None:
        """Take those of the steps up to ``step``; see `read`."""
        self._waiting.append(metrics)
        if len(self._waiting) >= _MOST_WAITING:
            self.read(step)

    def read(self, step: int) -> None:
        """Wait for all steps up to ``step``; raise at the first that is not finite."""
        if not self._waiting:
            return
        read = jax.device_get(self._waiting)
        self._waiting.clear()
        host = {name: np.concatenate([m[name] for m in read]) for name in read[0]}
        finite = host.pop("finite")
        if not finite.all():
            first = int(finite.argmin())
            bad = step - len(finite) + first + 1
            raise NonFiniteLossError(bad, float(host["loss"][first]))
        self.signs.look(host, step)
        self._num_steps += len(finite)
        for name, values in host.items():
            total = self._sums.get(name, 0.0)
            self._sums[name] = total + float(values.sum(dtype=np.float64))

    def means(self) -> dict[str, float]:
        """Return the means that are numbers, and start again."""
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        self._sums, self._num_steps = {}, 0
        return {name: value for name, value in means.items() if not math.isnan(value)}
