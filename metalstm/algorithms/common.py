"""Losses, accuracy and slots that several algorithms share; `make_algorithm`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import (
    Absorb,
    Adapt,
    Array,
    Aux,
    Episode,
    InitAlgorithm,
    InitCarry,
    LearnerState,
    MetaAlgorithm,
    MetaGradient,
    Predict,
    PyTree,
    TaskLoss,
    TrainSampler,
)
from metalstm.batches import (
    are_labels,
    check_adapt,
    check_outputs,
    check_predict,
    mask_of,
)
from metalstm.tasks import TaskMapping, mean_over_tasks

__all__ = [
    "RunningStatistics",
    "accuracy",
    "make_algorithm",
    "query_loss",
    "resampled",
    "squared_errors",
    "stop_statistics",
    "task_loss",
    "with_running_statistics",
]


def task_loss(outputs: Array, targets: Array, mask: Array | None = None) -> Array:
    """Return the mean cross-entropy of labels [N], or squared error of floats [N, d].

    It is infinite, and no gradient is finite, for a label outside [0, way). Rows where
    ``mask`` [N] is False count for nothing.

    Raises:
      ValueError: shapes that do not fit: see `metalstm.batches.check_outputs`.

    >>> task_loss(jnp.array([[0.0, 0.0]]), jnp.array([1])).round(4)  # log 2
    Array(0.6931, dtype=float32)
    >>> task_loss(jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [0.0]]))
    Array(2.5, dtype=float32)
    """
    check_outputs(outputs, targets)
    if mask is not None:  # a derivative must be finite there, too
        outputs = jnp.where(mask[:, None], outputs, 0)
        targets = jnp.where(mask if targets.ndim == 1 else mask[:, None], targets, 0)
    if are_labels(targets):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        is_class = _is_class(outputs, targets)
        losses = losses * jnp.where(is_class, 1.0, jnp.inf).astype(losses.dtype)
        return _mean(losses, mask)
    return _mean(jnp.square(outputs - targets), mask)


def accuracy(scores: Array, targets: Array, mask: Array | None = None) -> Array:
    """Return the share of correct labels, or minus the squared error of float targets.

    A query with a NaN among its scores counts as wrong. The result is infinite for a
    label outside [0, way). Rows where ``mask`` [N] is False count for nothing.

    >>> accuracy(jnp.array([[2.0, 1.0], [jnp.nan, 3.0]]), jnp.array([0, 1]))
    Array(0.5, dtype=float32)
    """
    if are_labels(targets):
        check_outputs(scores, targets)
        answered = ~jnp.isnan(scores).any(-1)
        correct = (scores.argmax(-1) == targets) & answered
        is_class = _is_class(scores, targets)
        return _mean(jnp.where(is_class, correct.astype(jnp.float32), jnp.inf), mask)
    return -squared_errors(scores, targets, mask).mean()


def squared_errors(outputs: Array, targets: Array, mask: Array | None = None) -> Array:
    """Return the mean squared error of each column of float targets [N, d].

    >>> squared_errors(jnp.array([[1.0, 0.0], [1.0, 4.0]]), jnp.zeros((2, 2)))
    Array([1., 8.], dtype=float32)
    """
    check_outputs(outputs, targets)
    errors = jnp.square(outputs - targets)
    return jax.vmap(lambda column: _mean(column, mask), 1)(errors)


def _mean(values: Array, mask: Array | None) -> Array:
    """The mean over the rows [N] or [N, d] that are examples."""
    if mask is None:
        return values.mean()
    mask = mask if values.ndim == 1 else mask[:, None]
    total = jnp.where(mask, values, 0).sum()
    return total / (mask.sum() * (values.size // mask.size)).astype(values.dtype)


def query_loss(predict: Predict, num_classes: int | None) -> TaskLoss:
    """Return a `MetaAlgorithm.loss`: the `task_loss` of the query set's scores.

    For a method whose scores have a gradient. The metrics have the accuracy.

    Args:
      predict: of `MetaAlgorithm`.
      num_classes: way of the tasks that meta-training samples; None for regression.
    """

    def loss(meta_params: PyTree, key: Array, episode: Episode) -> tuple[Array, Aux]:
        support, query = episode
        scores = predict(meta_params, key, support, query.x, num_classes=num_classes)
        mask = mask_of(query)
        metrics = {"accuracy": accuracy(scores, query.y, mask)}
        return task_loss(scores, query.y, mask), Aux(metrics)

    return loss


def resampled(**numbers: int | None) -> TrainSampler:
    """Return a `MetaAlgorithm.train_sampler`: the test's spec with other numbers.

    Args:
      numbers: fields of the spec, such as ``way`` and ``queries``; None: the test's.
    """
    changes = {name: n for name, n in numbers.items() if n is not None}
    return lambda spec: dataclasses.replace(spec, **changes) if changes else spec


def _is_class(scores: Array, labels: Array) -> Array:
    """[N]: False for a label that is no class, which JAX would clip or wrap."""
    return (labels >= 0) & (labels < scores.shape[-1])


def stop_statistics(state: LearnerState) -> LearnerState:
    """Stop gradients at everything but the parameters.

    Averages are gathered, never learned: a gradient step could make a variance
    negative.
    """
    stats, other = jax.lax.stop_gradient((state.stats, state.other))
    return state._replace(stats=stats, other=other)


class RunningStatistics(NamedTuple):
    """The carry of algorithms that normalise by averages over meta-training."""

    num_steps: Array  # meta-steps seen, float32
    stats: PyTree  # the averages

    def going_on(self, drawn: PyTree) -> RunningStatistics:
        """Count the averages as a full one, unless they are as they were ``drawn``."""
        pairs = zip(*map(jax.tree.leaves, (self.stats, drawn)), strict=True)
        gathered = jnp.array([jnp.any(mine != first) for mine, first in pairs])
        return self._replace(num_steps=jnp.where(gathered.any(), _HORIZON, 0.0))


_HORIZON = 100.0  # meta-steps in the average, from then on: a momentum of 0.99


def with_running_statistics(
    loss: Callable[..., tuple[Array, Aux]],
    *,
    read: Callable[[PyTree], PyTree],
    write: Callable[[PyTree, PyTree], PyTree],
    task_mapping: TaskMapping | None = None,
) -> dict[str, Callable]:
    """Return the slots of `make_algorithm` that average batch statistics.

    Args:
      loss: of `MetaAlgorithm`, whose ``Aux.gathered`` are one task's statistics.
      read, write: where the averages live in the meta-parameters, for `predict`. No
        gradient may touch them.
      task_mapping: as in `make_algorithm`.
    """

    def init_carry(key: Array, meta_params: PyTree, episode) -> RunningStatistics:
        del key, episode
        return RunningStatistics(jnp.float32(0), read(meta_params))

    def meta_gradient(meta_params, carry: RunningStatistics, keys, episodes):
        gradient = functools.partial(_gradient_of_task, loss, meta_params)
        grads, (metrics, stats) = mean_over_tasks(
            gradient, keys, episodes, how=task_mapping
        )
        # a plain mean at first, so that the initial values leave no trace
        weight = jnp.maximum(1 / (carry.num_steps + 1), 1 / _HORIZON)
        stats = jax.tree.map(
            lambda old, new: old + weight * (new - old), carry.stats, stats
        )
        return grads, RunningStatistics(carry.num_steps + 1, stats), metrics

    def absorb(meta_params, carry: RunningStatistics):
        return write(meta_params, carry.stats)

    return {
        "init_carry": init_carry,
        "meta_gradient": meta_gradient,
        "absorb": absorb,
    }


def _gradient_of_task(
    loss: Callable[..., tuple[Array, Aux]], meta_params: PyTree, key: Array, episode
) -> tuple[PyTree, tuple[dict[str, Array], PyTree]]:
    """The gradient of one task's loss, with its metrics and what it gathered."""

    def objective(meta_params):
        value, aux = loss(meta_params, key, episode)
        return value, ({"loss": value, **aux.metrics}, aux.gathered)

    return jax.grad(objective, has_aux=True)(meta_params)


def make_algorithm(
    *,
    init: InitAlgorithm,
    predict: Predict,
    loss: TaskLoss | None = None,
    adapt: Adapt | None = None,
    init_carry: InitCarry | None = None,
    meta_gradient: MetaGradient | None = None,
    absorb: Absorb | None = None,
    train_sampler: TrainSampler | None = None,
    query_norm: str | None = None,
    trainable: bool = True,
    per_task_carry: bool = False,
    masked: bool = False,
    task_mapping: TaskMapping | None = None,
) -> MetaAlgorithm:
    """Fill in a `MetaAlgorithm`'s optional slots.

    The default ``meta_gradient`` is the mean over tasks of ``grad(loss)``; the default
    carry is ``()``; the default ``train_sampler`` trains on the test-time spec.

    Args:
      task_mapping: of the default ``meta_gradient``; see `metalstm.tasks.map_tasks`.

    Raises:
      ValueError: it is trainable, and has neither ``loss`` nor ``meta_gradient``. From
        ``predict`` and ``adapt``: labels or targets that do not fit the task.
    """
    if trainable and loss is None and meta_gradient is None:
        raise ValueError("a trainable algorithm needs loss= or meta_gradient=")

    def no_loss(meta_params, key, episode):
        raise ValueError("this algorithm has no meta-training loss (trainable=False)")

    loss_fn = no_loss if loss is None else loss

    def mean_gradient(meta_params, carry, keys, episodes):
        def gradient(key, episode):
            grads, (metrics, _) = _gradient_of_task(loss_fn, meta_params, key, episode)
            return grads, metrics

        grads, metrics = mean_over_tasks(gradient, keys, episodes, how=task_mapping)
        return grads, carry, metrics

    return MetaAlgorithm(
        init=init,
        loss=loss_fn,
        predict=check_predict(predict, masked),
        adapt=None if adapt is None else check_adapt(adapt),
        init_carry=init_carry or (lambda key, meta_params, episode: ()),
        meta_gradient=meta_gradient or mean_gradient,
        absorb=absorb or (lambda meta_params, carry: meta_params),
        train_sampler=train_sampler or (lambda spec: spec),
        query_norm=query_norm,
        trainable=trainable,
        per_task_carry=per_task_carry,
        masked=masked,
    )
