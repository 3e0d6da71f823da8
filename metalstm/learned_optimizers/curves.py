"""Compare optimizers on equal terms: the same instances, starts and minibatches.

Notation: I instances, S + 1 recorded losses, G points of a grid of hyper-parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.checks import check_at_least, check_choice
from metalstm.inner import second_order, unroll
from metalstm.learned_optimizers.problems import ProblemFamily
from metalstm.rules import as_rule
from metalstm.statistics import Estimate, mean_and_ci95
from metalstm.tasks import TaskMapping, map_tasks

__all__ = [
    "Summary",
    "Sweep",
    "capped_logs",
    "curve_difference",
    "loss_curves",
    "make_loss_curves",
    "summary",
    "sweep",
]

_START, _BATCH, _EVAL = 0, 1, 2  # folded into an instance's key


def loss_curves(
    family: ProblemFamily,
    tx: UpdateRule | optax.GradientTransformation,
    data: Any = None,
    *,
    num_instances: int,
    num_steps: int,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Train ``num_instances`` problems with ``tx``: their losses, float32 [I, S + 1].

    Instance i, its start and its minibatches are functions of (seed, i) alone, so two
    optimizers can be compared pair by pair. ``options`` are `make_loss_curves`'s. Every
    call compiles; to evaluate one rule often, call `make_loss_curves` once.
    """
    run = make_loss_curves(
        family,
        tx,
        num_instances=num_instances,
        num_steps=num_steps,
        **options,
    )
    return run((), data, seed)


def make_loss_curves(
    family: ProblemFamily,
    rule: UpdateRule | optax.GradientTransformation,
    *,
    num_instances: int,
    num_steps: int,
    record_every: int = 1,
    eval_batch: int | None = None,
    task_mapping: TaskMapping | None = None,
    measured: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Callable[[PyTree, Any, int], np.ndarray]:
    """Compile once, evaluate often: ``(rule params, data, seed) -> losses [I, S + 1]``.

    Column s is the loss after ``s * record_every`` updates, the last after
    ``num_steps``.

    Args:
      record_every: updates from one recorded loss to the next.
      eval_batch: number of examples that a recorded loss is the mean over; new ones at
        every record, the same for every optimizer (take 1,000 or more to report). None:
        the minibatch of the next update, as in published curves.
      task_mapping: how instances are laid out; see `metalstm.tasks.map_tasks`. "vmap"
        is by far the fastest for small problems.
      measured: ``(state of the rule, params) -> params`` whose loss is recorded, such
        as `optax.contrib.schedule_free_eval_params`. None: the parameters themselves.

    Raises:
      ValueError: ``num_steps``, ``record_every`` or ``num_instances`` is below 1.
    """
    curves = jax.jit(
        _curves(
            family,
            as_rule(rule),
            num_instances,
            num_steps,
            record_every,
            eval_batch,
            task_mapping,
            measured,
        )
    )

    def run(params: PyTree, data: Any = None, seed: int = 0) -> np.ndarray:
        return np.asarray(curves(params, data, jnp.uint32(seed)))

    return run


def _curves(
    family: ProblemFamily,
    rule: UpdateRule,
    num_instances: int,
    num_steps: int,
    record_every: int,
    eval_batch: int | None,
    task_mapping: TaskMapping | None,
    measured: Callable[[PyTree, PyTree], PyTree] | None,
) -> Callable[[PyTree, Any, Array], Array]:
    for name, value in (
        ("num_instances", num_instances),
        ("num_steps", num_steps),
        ("record_every", record_every),
    ):
        check_at_least(name, value, 1)
    rest = num_steps % record_every

    def one(rule_params: PyTree, data: Any, key: Array) -> Array:
        task_key, init_key = jax.random.split(jax.random.fold_in(key, _START))
        task = family.sample(task_key, data)
        params = family.init(init_key, task)

        def batch_at(t: Array) -> PyTree:
            step_key = jax.random.fold_in(jax.random.fold_in(key, _BATCH), t)
            return family.batch(step_key, data)

        def loss_at(params, stats, t, key):
            del key
            return family.loss(params, task, batch_at(t)), stats

        def measure(params: PyTree, rule_state: PyTree, t: Array) -> Array:
            if measured is not None:
                params = measured(rule_state, params)
            batch = batch_at(t)
            if eval_batch is not None:
                eval_key = jax.random.fold_in(jax.random.fold_in(key, _EVAL), t)
                batch = family.batch(eval_key, data, eval_batch)
            return family.loss(params, task, batch).astype(jnp.float32)

        def record(carry, start: Array, length: int = record_every):
            params, rule_state = carry
            loss = measure(params, rule_state, start)
            end, _ = unroll(
                loss_at,
                rule,
                rule_params,
                params,
                start + jnp.arange(length),
                num_steps=length,
                # nothing is differentiated: the plain loop, which keeps nothing
                differentiation=second_order("all"),
                rule_state=rule_state,
            )
            return (end.params, end.rule_state), loss

        start = (params, rule.bind(rule_params).init(params))
        end, losses = lax.scan(
            record, start, jnp.arange(0, num_steps - rest, record_every)
        )
        if rest:
            end, loss = record(end, jnp.int32(num_steps - rest), rest)
            losses = jnp.append(losses, loss)
        last = measure(*end, jnp.int32(num_steps))
        return jnp.append(losses, last)

    def curves(rule_params: PyTree, data: Any, seed: Array) -> Array:
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
            jnp.arange(num_instances)
        )
        return map_tasks(
            lambda key: one(rule_params, data, key), keys, how=task_mapping
        )

    return curves


class Sweep(NamedTuple):
    """The scores and curves of a grid of hyper-parameters."""

    grid: dict[str, np.ndarray]  # each [G]: the product of the axes
    scores: np.ndarray  # [G], lower is better
    curves: np.ndarray  # [G, I, S + 1]
    best: dict[str, float]  # the point of the lowest score
    inside: dict[str, bool]  # per axis: whether the best is not at an end of it

    @property
    def best_curves(self) -> np.ndarray:
        return self.curves[int(np.argmin(self.scores))]


def sweep(
    family: ProblemFamily,
    rule: UpdateRule,
    grid: Mapping[str, Sequence[float]],
    data: Any = None,
    *,
    num_instances: int,
    num_steps: int,
    seed: int = 0,
    score: Literal["mean", "mean_log"] = "mean",
    **options: Any,
) -> Sweep:
    """Try every point of ``grid`` for a rule made by `metalstm.rules.tunable`.

    All points run in one program. Tune on another ``seed`` than you report; an optimum
    that is not ``inside`` its axis says that the grid is too small.

    Args:
      grid: hyper-parameter -> values, ascending; several axes make their product.
      score: over instances, of the last loss or of its logarithm. A point at which an
        instance's last loss is not finite scores infinity.
      options: those of `make_loss_curves`.

    Raises:
      ValueError: an empty axis, or names that are not the rule's.
    """
    check_choice("score", score, ("mean", "mean_log"))
    if not grid or not all(len(axis) for axis in grid.values()):
        raise ValueError(f"grid={dict(grid)}: give every hyper-parameter its values")
    expected = rule.init(jax.random.key(0), {})
    if not isinstance(expected, dict) or set(expected) != set(grid):
        names = ", ".join(expected) if isinstance(expected, dict) else "no such names"
        raise ValueError(
            f"grid names {', '.join(grid)} but the rule has {names}: build it with "
            "rules.tunable(factory, **the same names)"
        )
    unset = dict.fromkeys(("eval_batch", "task_mapping", "measured"))
    settings: dict[str, Any] = {"record_every": 1} | unset | options
    curves_of = _curves(family, rule, num_instances, num_steps, **settings)
    axes = [np.asarray(axis, np.float32) for axis in grid.values()]
    points = np.stack([m.reshape(-1) for m in np.meshgrid(*axes, indexing="ij")])
    product = dict(zip(grid, points, strict=True))
    curves = np.asarray(
        jax.jit(jax.vmap(curves_of, in_axes=(0, None, None)))(
            product, data, jnp.uint32(seed)
        )
    )
    scores = np.array([_score(last, score) for last in curves[..., -1]])
    best = int(np.argmin(scores))
    where = np.unravel_index(best, [len(axis) for axis in axes])
    return Sweep(
        grid=product,
        scores=scores,
        curves=curves,
        best={name: float(values[best]) for name, values in product.items()},
        inside={
            name: bool(0 < k < len(axis) - 1)
            for name, k, axis in zip(grid, where, axes, strict=True)
        },
    )


def _score(last: np.ndarray, score: str) -> float:
    if not np.isfinite(last).all():
        return float("inf")
    last = last.astype(np.float64)
    return float(_logs(last).mean() if score == "mean_log" else last.mean())


def _logs(losses: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(losses, np.finfo(np.float32).tiny))


class Summary(NamedTuple):
    """Losses over instances at one step; infinite where one of them is not finite.

    ``mean`` is dominated by the worst instances; ``mean_log`` alone can favour a rule
    that sometimes diverges.
    """

    mean: float
    ci95: float  # half the interval over instances
    mean_log: float
    median: float
    p99: float
    share_diverged: float  # not finite, or above its own loss at step 0


def summary(curves: np.ndarray, at: int = -1) -> Summary:
    """Summarise column ``at`` of ``curves`` [I, S + 1]."""
    start, losses = np.asarray(curves, np.float64)[:, [0, at]].T
    finite = np.isfinite(losses)
    diverged = ~finite | (losses > start)
    losses = np.where(finite, losses, np.inf)
    mean, ci95 = mean_and_ci95(losses) if finite.all() else (np.inf, np.inf)
    return Summary(
        mean=float(mean),
        ci95=float(ci95),
        mean_log=float(_logs(losses).mean()),
        median=float(np.median(losses)),
        p99=float(np.quantile(losses, 0.99, method="higher")),
        share_diverged=float(diverged.mean()),
    )


def capped_logs(curves: np.ndarray, at: int = -1) -> np.ndarray:
    """Return the logs of column ``at`` of ``curves`` [I, S + 1], float64 [I].

    No loss counts as more than 1,000 times its first, and one that is not a number as
    that, so that a mean exists where an instance diverges, and none does so for free.

    >>> print(capped_logs(np.array([[1.0, 1.0], [1.0, np.nan], [1.0, 1e9]])).round(2))
    [0.   6.91 6.91]
    """
    start, losses = np.asarray(curves, np.float64)[:, [0, at]].T
    worst = 1e3 * start
    return _logs(np.where(losses < worst, losses, worst))  # NaN is not below


def curve_difference(
    a: np.ndarray, b: np.ndarray, at: int = -1, *, log: bool = False
) -> Estimate:
    """Mean and 95% half-interval of ``a - b`` at column ``at``, instance by instance.

    Args:
      a, b: [I, S + 1] over the same instances.
      log: compare `capped_logs`.

    Raises:
      ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"curves of shapes {a.shape} and {b.shape} are not in pairs")
    if log:
        return mean_and_ci95(capped_logs(a, at) - capped_logs(b, at))
    last_a, last_b = (np.asarray(x, np.float64)[:, at] for x in (a, b))
    return mean_and_ci95(last_a - last_b)
