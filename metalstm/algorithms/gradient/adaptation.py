"""Adapt a learner to a support set by updates of a rule, and predict its queries.

Notation: T updates, theta_0 .. theta_T; N examples in a support set, M queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import task_loss
from metalstm.base import (
    Array,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaParams,
    Norm,
    PyTree,
    QueryNorm,
    UpdateRule,
)
from metalstm.batches import (
    first_example,
    join_examples,
    mask_of,
    num_examples,
    only_present,
)
from metalstm.inner import Differentiation, InnerState, Trace, unroll
from metalstm.nn.heads import output_shape

__all__ = [
    "Adaptation",
    "Adapted",
    "adapt_to",
    "gradient_scale",
    "query_outputs",
    "step_scale",
    "support_metrics",
]

# folded into an episode's key, one for each use of randomness
_INIT, _DROPOUT, _ORDER = 0, 1, 2
_NUM_DRAWS = 4  # of theta, to find a step size


class Adaptation(NamedTuple):
    """How a learner adapts to a support set; fields as in `learned_init`."""

    learner: Learner
    rule: UpdateRule
    differentiation: Differentiation
    support_stats: Literal["final", "moving"]
    learn_init: bool
    batch_size: int | None
    gradient_scale: float | Literal["1/batch", "way"]
    scan_unroll: int
    axis_name: str | None
    gathers: bool  # averages over meta-training, for "frozen"


class Adapted(NamedTuple):
    learner: LearnerState  # at theta_T
    inner: InnerState
    trace: Trace


def adapt_to(
    adaptation: Adaptation,
    meta_params: MetaParams,
    key: Array,
    support: Batch,
    *,
    num_steps: int,
    norm: QueryNorm,
    way: int | None,
    observe: Callable[[InnerState], PyTree] | None = None,
) -> Adapted:
    """Run the inner loop on one support set.

    Args:
      norm: of the queries. ``frozen`` normalises the support set by the averages over
        meta-training too, the others by its own statistics.
      way: classes of the task, for a learner whose head fits any number of them.
    """
    learner = adaptation.learner
    state = _start(adaptation, meta_params, key, support.x, way)
    stats = meta_params.learner.stats if norm == "frozen" else state.stats
    moving = adaptation.support_stats == "moving" and norm == "support"
    if moving and jax.tree.leaves(stats):
        # each episode's own: not what meta-training has averaged over others
        drawn = learner.init(jax.random.fold_in(key, _INIT), first_example(support.x))
        stats = jax.tree.map(lambda d, s: d.astype(s.dtype), drawn.stats, stats)
    if mask_of(support) is not None and jax.tree.leaves(stats):
        raise ValueError(
            "the learner has batch norm, whose statistics would count rows that are no "
            "examples: choose tasks of one size (EpisodeSpec), or a learner without it"
        )
    support_norm: Norm = "stored" if norm == "frozen" else "batch"

    def loss_fn(params, stats, batch, step_key):
        batch = support if batch is None else batch
        outputs, new = learner.apply(
            LearnerState(params, stats, state.other),
            batch.x,
            norm=support_norm,
            key=step_key,
        )
        outputs = only_present(outputs, support)
        return task_loss(outputs, batch.y, mask_of(batch)), new.stats

    inner, trace = unroll(
        loss_fn,
        adaptation.rule,
        meta_params.rule,
        state.params,
        _minibatches(key, support, adaptation.batch_size, num_steps),
        num_steps=num_steps,
        differentiation=adaptation.differentiation,
        stats=stats,
        gradient_scale=gradient_scale(
            adaptation.gradient_scale, learner, state, support, adaptation.batch_size
        ),
        observe=observe,
        key=jax.random.fold_in(key, _DROPOUT),
        axis_name=adaptation.axis_name,
        scan_unroll=adaptation.scan_unroll,
    )
    at_end = LearnerState(inner.params, inner.stats, state.other)
    return Adapted(at_end, inner, trace)


def support_metrics(trace: Trace, batch_size: int | None) -> dict[str, Array]:
    """Return the first update's loss, and whether that of the last is above it.

    Losses of minibatches are of different examples, and are not compared.
    """
    losses = lax.stop_gradient(trace.losses)
    metrics = {"support_loss": losses[0]}
    if batch_size is None:  # NaN rose, too
        rose = ~(losses[-1] <= losses[0])
        metrics["support_loss_rose"] = rose.astype(jnp.float32)
    return metrics


def step_scale(
    learner: Learner, key: Array, episode: Episode, way: int | None, num_steps: int
) -> Array:
    r"""Return the step size by which gradient descent lowers the query loss most.

    The geometric mean of that of some draws of theta: for a single one, a step that is
    much too large may happen to end well. The query set judges, since of one image a
    class a network with batch norm fits the support set by almost any step. From each
    draw, gradient descent on the support set is run with the step sizes
    :math:`4^k \cdot 4 L / |\nabla L|^2`, k = -6 .. 4, then with half and twice the
    best. For L = h theta^2 / 2 the unit is 2 / h, beyond which it diverges: it falls
    with the square of the features' length and does not depend on the number of
    examples, of which the loss is the mean. How far from it the best step is depends on
    the curvature along the way, which neither the gradient nor the largest eigenvalue
    at theta tells.

    Args:
      key: of the draws.
      episode: support and query set of one meta-training task.
      way: classes, for a learner whose head fits any number of them.
      num_steps: updates.

    Returns:
      A float32; 1 where no step lowers the loss.
    """
    support = episode.support

    def log_best_step(key: Array) -> tuple[Array, Array]:
        state = learner.init(key, first_example(support.x))
        params = state.params
        if learner.at_way is not None:
            params = learner.at_way(params, way or num_examples(support.x))

        def loss_on(batch: Batch) -> Callable[[PyTree], Array]:
            def loss_fn(params: PyTree) -> Array:
                now = state._replace(params=params)
                outputs, _ = learner.apply(now, batch.x, norm="batch")
                outputs = only_present(outputs, support)
                loss = task_loss(outputs, batch.y, mask_of(batch))
                return loss.astype(jnp.float32)

            return loss_fn

        return _log_best_step(
            loss_on(support), loss_on(episode.query), params, num_steps
        )

    @jax.jit
    def mean_step() -> Array:
        # one after another: no more memory than an inner loop
        logs, found = lax.map(log_best_step, jax.random.split(key, _NUM_DRAWS))
        return jnp.exp(
            jnp.where(found, logs, 0).sum()
            / jnp.maximum(found.sum(dtype=logs.dtype), 1)
        )

    return mean_step()


def _log_best_step(
    loss_fn: Callable[[PyTree], Array],
    query_loss_fn: Callable[[PyTree], Array],
    params: PyTree,
    num_steps: int,
) -> tuple[Array, Array]:
    """Of one draw: the log, and whether any step lowers the query loss."""

    def loss_after(scale: Array) -> Array:
        def update(params: PyTree, _):
            step = lambda p, g: (p - scale * g).astype(p.dtype)  # noqa: E731
            return jax.tree.map(step, params, jax.grad(loss_fn)(params)), ()

        loss = query_loss_fn(lax.scan(update, params, length=num_steps)[0])
        return jnp.where(jnp.isfinite(loss), loss, jnp.inf)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    before = query_loss_fn(params)
    leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    square = sum((jnp.vdot(g, g) for g in leaves), jnp.float32(0))
    unit = 4 * loss / jnp.where(square > 0, square, 1)
    scales = unit * 4.0 ** jnp.arange(-6, 5, dtype=jnp.float32)
    losses = lax.map(loss_after, scales)
    coarse = scales[jnp.argmin(losses)]
    near = coarse * jnp.array([0.5, 2.0], jnp.float32)
    scales = jnp.concatenate([coarse[None], near])
    losses = jnp.concatenate([losses.min()[None], lax.map(loss_after, near)])
    lowered = (losses.min() < before) & (square > 0) & jnp.isfinite(unit)
    best = jnp.where(lowered, scales[jnp.argmin(losses)], jnp.float32(1))
    return jnp.log(best), lowered


def _start(
    adaptation: Adaptation,
    meta_params: MetaParams,
    key: Array,
    x: Array,
    way: int | None,
) -> LearnerState:
    """theta_0, learned or drawn, with a head for the task's classes."""
    learner, state = adaptation.learner, meta_params.learner
    if not adaptation.learn_init:
        state = learner.init(jax.random.fold_in(key, _INIT), first_example(x))
    if learner.at_way is None:
        return state
    if way is None:
        raise ValueError(
            "the learner's head fits any number of classes, so it must be told how "
            "many: train_way= to meta-train, num_classes= to adapt and predict"
        )
    return state._replace(params=learner.at_way(state.params, way))


def query_outputs(
    adaptation: Adaptation,
    meta_params: MetaParams,
    adapted: Adapted,
    support: Batch,
    query_x: Array,
    norm: QueryNorm,
) -> Array:
    learner, state = adaptation.learner, adapted.learner
    if norm == "frozen":
        state = state._replace(stats=meta_params.learner.stats)
    if norm == "support" and adaptation.support_stats == "final":
        _, state = learner.apply(state, support.x, norm="gather")
    if norm == "support+1":
        outputs = _one_by_one(learner, state, support.x, query_x)
        return only_present(outputs, support)
    mode: Norm = "batch" if norm == "transductive" else "stored"
    outputs, _ = learner.apply(state, query_x, norm=mode)
    return only_present(outputs, support)


def _one_by_one(learner: Learner, state: LearnerState, support_x, query_x) -> Array:
    """Normalise each query together with the support set alone (`support+1`)."""

    def one(x):
        together = join_examples(support_x, jax.tree.map(lambda leaf: leaf[None], x))
        outputs, _ = learner.apply(state, together, norm="batch")
        return outputs[-1]

    return lax.map(one, query_x)


def gradient_scale(
    scale: float | Literal["1/batch", "way"],
    learner: Learner,
    state: LearnerState,
    support: Batch,
    batch_size: int | None,
) -> float:
    """Return the number that a ``gradient_scale`` of `learned_init` stands for."""
    if scale == "1/batch":
        return 1 / (batch_size or num_examples(support.x))
    if scale == "way":
        return float(output_shape(learner, state, first_example(support.x)).shape[-1])
    return float(scale)


def _minibatches(key: Array, support: Batch, batch_size: int | None, num_steps: int):
    """Stacked minibatches [num_steps, batch_size, ...], or None for the whole set."""
    if batch_size is None:
        return None
    num_images = num_examples(support.x)
    if not 1 <= batch_size <= num_images or num_images % batch_size:
        raise ValueError(
            f"batch_size={batch_size} does not divide the {num_images} images of the "
            "support set: choose a divisor"
        )
    num_epochs = -(-num_steps * batch_size // num_images)
    order_key = jax.random.fold_in(key, _ORDER)
    orders = [
        jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images)
        for epoch in range(num_epochs)
    ]
    rows = jnp.concatenate(orders)[: num_steps * batch_size]
    rows = rows.reshape(num_steps, batch_size)
    return jax.tree.map(lambda leaf: leaf[rows], support)
