"""Estimators of the gradient of one segment of inner training: backprop, evolution.

Notation: T tasks, K updates a segment, N coordinates of a task's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.inner import Differentiation, InnerState, second_order, unroll
from metalstm.learned_optimizers.problems import ProblemFamily
from metalstm.rules import flat
from metalstm.runtime import sharding
from metalstm.tasks import TaskMapping, map_tasks

__all__ = [
    "DIVERGED",
    "NOT_YET",
    "Estimate",
    "Horizon",
    "InnerRuns",
    "LossTransform",
    "Settings",
    "backprop",
    "evolution",
    "stacked_backprop",
]

Horizon = int | tuple[int, int] | Callable[[Array], Array]
LossTransform = Literal["none", "log", "relative", "log_relative"]

DIVERGED = 1e12
"""A loss counts as this at most, and is then constant to every derivative: an instance
that diverges cannot make the gradient of the others NaN."""

NOT_YET = float("inf")
"""Stands for L(theta_0) until a run's first segment has computed it."""

_TINY = 1e-12  # keeps log and division of a loss finite
_FLOOR = 1e-3  # of "log_relative": a loss below this share of the first hardly counts


class Settings(NamedTuple):
    """What `learned_optimizer` was given; its docstring describes the fields."""

    family: ProblemFamily
    rule: UpdateRule
    num_tasks: int
    unroll_steps: int
    horizon: Horizon
    differentiation: Differentiation
    weights: Callable[[Array], Array] | None
    loss_transform: LossTransform
    estimator: Literal["backprop", "pes"]
    pes_std: float
    stagger: bool
    tell_progress: float
    scan_unroll: int
    task_mapping: TaskMapping | Literal["stacked"] | None
    axis_name: str | None


class InnerRuns(NamedTuple):
    """The carry: where each task's inner training is. Every leaf leads with [T]."""

    params: PyTree  # with "pes" [T, 2, ...], one for each sign of the perturbation
    rule_state: PyTree  # likewise
    task: PyTree
    first_loss: Array  # [T] at theta_0; NOT_YET before the first segment
    inner_step: Array  # int32 [T] updates done; -1: start again
    length: Array  # int32 [T] updates of the whole run, fixed when it starts
    meta_step: Array  # int32 [T] meta-steps done, the same for all
    shift: PyTree  # "pes": sum of the perturbations since the start; otherwise ()


class Estimate(NamedTuple):
    """The values of a segment besides its gradient, of one task or with a leading [T].

    Stacked tasks share ``value``.
    """

    value: Array  # the objective
    losses: Array  # [K + 1] at theta_s .. theta_{s+K}
    runs: InnerRuns  # after the segment


def backprop(
    settings: Settings, meta_params: PyTree, runs: InnerRuns, batches: PyTree
) -> tuple[PyTree, Estimate]:
    """Differentiate one task's segment, its start being a constant."""

    def objective(meta_params):
        losses, inner = _segment(
            settings,
            meta_params,
            runs.params,
            runs.rule_state,
            lambda params, batch: _loss(settings, params, runs.task, batch),
            batches,
        )
        value, first = _objective(settings, losses, runs)
        return value, (losses, first, inner)

    gradient_fn = jax.value_and_grad(objective, has_aux=True)
    (value, (losses, first, inner)), grads = gradient_fn(meta_params)
    grads, losses = _zero_unless_finite(grads, losses)
    after = runs._replace(
        params=inner.params, rule_state=inner.rule_state, first_loss=first
    )
    return grads, Estimate(value, losses, after)


def stacked_backprop(
    settings: Settings,
    meta_params: PyTree,
    runs: InnerRuns,
    batches: PyTree,
    per_coordinate: PyTree,
) -> tuple[PyTree, Estimate]:
    """`backprop` of all T tasks at once, as one problem of T N coordinates.

    Args:
      per_coordinate: of one task's rule state; see `rules.flat.per_coordinate_leaves`.

    Returns:
      The gradient of the mean over tasks, and their estimates.
    """
    num_tasks = runs.inner_step.shape[0]
    one_task = jax.tree.map(lambda x: x[0], runs.params)
    unflatten = jax.vmap(lambda vector: flat.unflatten(vector, one_task))

    def losses_of(vector: Array, batch: PyTree) -> Array:  # [T N] -> [T]
        params = unflatten(vector.reshape(num_tasks, -1))
        return jax.vmap(lambda *xs: _loss(settings, *xs))(params, runs.task, batch)

    def objective(meta_params):
        losses, inner = _segment(
            settings,
            meta_params,
            jax.vmap(flat.flatten)(runs.params).reshape(-1),
            _stack(runs.rule_state, per_coordinate),
            losses_of,
            jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches),
        )
        value, first = _objective(settings, losses, runs)
        return value, (losses, first, inner)

    gradient_fn = jax.value_and_grad(objective, has_aux=True)
    (value, (losses, first, inner)), grads = gradient_fn(meta_params)
    grads, losses = _zero_unless_finite(grads, losses)
    after = runs._replace(
        params=unflatten(inner.params.reshape(num_tasks, -1)),
        rule_state=_unstack(inner.rule_state, per_coordinate, num_tasks),
        first_loss=first,
    )
    return grads, Estimate(value, losses.T, after)


def _zero_unless_finite(grads: PyTree, losses: Array) -> tuple[PyTree, Array]:
    """A derivative may overflow where no loss does: its tasks then count as diverged.

    Of stacked tasks, which share a gradient, all do.
    """
    finite = jnp.isfinite(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
    return grads, losses.at[-1].set(jnp.where(finite, losses[-1], DIVERGED))


def evolution(
    settings: Settings, meta_params: PyTree, key: Array, runs: InnerRuns, batches
) -> tuple[Array, Estimate]:
    """Persistent evolution strategies of one task (Vicol et al., 2021, equation 10).

    Returns:
      The slope along the task's ``shift``, whose product is the estimated gradient.
    """
    noise = _noise(key, meta_params, settings.pes_std)
    shift = jax.tree.map(jnp.add, runs.shift, noise)
    # nothing is differentiated: the plain loop, which keeps nothing
    settings = settings._replace(differentiation=second_order("all"))

    def one_sign(sign, params, rule_state):
        losses, inner = _segment(
            settings,
            jax.tree.map(
                lambda w, e: (w + sign * e).astype(w.dtype), meta_params, noise
            ),
            params,
            rule_state,
            lambda params, batch: _loss(settings, params, runs.task, batch),
            batches,
        )
        return *_objective(settings, losses, runs), losses, inner

    values, first, losses, inner = _map_pair(
        one_sign,
        jnp.array([1.0, -1.0]),
        runs.params,
        runs.rule_state,
        axis_name=settings.axis_name,
        how="vmap" if settings.task_mapping == "vmap" else None,
    )
    # a pair that diverged says nothing about the slope
    slope = (values[0] - values[1]) / (2 * settings.pes_std**2)
    slope = jnp.where((losses < DIVERGED).all(), slope, 0.0)
    after = runs._replace(
        params=inner.params,
        rule_state=inner.rule_state,
        first_loss=first.mean(),
        shift=shift,
    )
    return slope, Estimate(values.mean(), losses.mean(0), after)


def _segment(
    settings: Settings,
    meta_params: PyTree,
    params: PyTree,
    rule_state: PyTree,
    loss_fn: Callable[[PyTree, PyTree], Array],
    batches: PyTree,
) -> tuple[Array, InnerState]:
    """K updates: the losses [K + 1, ...] at theta_s .. theta_{s+K}, the end."""
    inner, trace = unroll(
        lambda params, stats, batch, key: (loss_fn(params, batch), stats),
        settings.rule,
        meta_params,
        params,
        jax.tree.map(lambda x: x[:-1], batches),
        num_steps=settings.unroll_steps,
        differentiation=settings.differentiation,
        rule_state=rule_state,
        axis_name=settings.axis_name,
        scan_unroll=settings.scan_unroll,
    )
    last = loss_fn(inner.params, jax.tree.map(lambda x: x[-1], batches))
    return jnp.concatenate([trace.losses, last[None]]), inner


def _loss(settings: Settings, params: PyTree, task: PyTree, batch: PyTree) -> Array:
    loss = settings.family.loss(params, task, batch)
    return jnp.where(loss < DIVERGED, loss, DIVERGED)  # NaN is not below it


def _objective(
    settings: Settings, losses: Array, runs: InnerRuns
) -> tuple[Array, Array]:
    """Losses [K + 1, ...] of one task, or of all: the mean, and L(theta_0)."""
    starts = runs.first_loss == NOT_YET
    first = jnp.where(starts, lax.stop_gradient(losses[0]), runs.first_loss)
    terms = losses[1:]
    if settings.loss_transform == "log":
        terms = jnp.log(terms + _TINY)
    elif settings.loss_transform != "none":
        terms = terms / (first + _TINY)[None]
    if settings.loss_transform == "log_relative":
        terms = jnp.log(terms + _FLOOR)
    if settings.weights is not None:
        steps = jnp.arange(1, settings.unroll_steps + 1)
        steps = steps.reshape(-1, *(1,) * first.ndim) + runs.inner_step[None]
        terms = terms * settings.weights(steps / runs.length[None])
    return terms.mean(), first


def _map_pair(
    fn: Callable, *args: PyTree, axis_name: str | None, how: TaskMapping | None
) -> PyTree:
    """``fn`` of each of two, the leading axis; by two devices if they share a task."""
    if axis_name is None or sharding.axis_devices(axis_name) == 1:
        # on a CPU one after the other: XLA computes a single product on all cores
        return map_tasks(fn, *args, how=how)
    sign = lax.axis_index(axis_name) % 2
    out = fn(*jax.tree.map(lambda leaf: leaf[sign], args))
    return jax.tree.map(lambda leaf: sharding.collect(leaf, axis_name)[:2], out)


def _noise(key: Array, template: PyTree, std: float) -> PyTree:
    leaves, treedef = jax.tree.flatten(template)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        std * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def _stack(states: PyTree, per_coordinate: PyTree) -> PyTree:
    """[T, ..., N] -> [..., T N], the state of one large problem."""

    def one(per_coordinate: bool, x: Array) -> Array:
        if not per_coordinate:  # tasks in step with each other: the same for all
            return x[0]
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)

    return jax.tree.map(one, per_coordinate, states)


def _unstack(state: PyTree, per_coordinate: PyTree, num_tasks: int) -> PyTree:
    """The inverse of `_stack`."""

    def one(per_coordinate: bool, x: Array) -> Array:
        if not per_coordinate:
            return jnp.broadcast_to(x, (num_tasks, *x.shape))
        x = x.reshape(*x.shape[:-1], num_tasks, -1)
        return jnp.moveaxis(x, -2, 0)

    return jax.tree.map(one, per_coordinate, state)
