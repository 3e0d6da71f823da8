"""Meta-train an update rule on problems: truncated back-propagation, or evolution.

Letters: T tasks (problems in training at once), K updates a segment, N coordinates.

A task's inner training is cut into segments of K updates and goes on from one meta-step
to the next: the carry holds its parameters and the rule's state. Full back-propagation
is K = horizon.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import check_differentiable
from metalstm.base import (
    Array,
    MetaAlgorithm,
    PyTree,
    TaskMapping,
    UpdateRule,
    make_algorithm,
    map_tasks,
)
from metalstm.inner.loop import InnerState, Memory, unroll
from metalstm.learned_optimizers.problems import Draw, ProblemFamily, ProblemSampler
from metalstm.rules.flat import coordinate_dtype, flatten, unflatten
from metalstm.runtime import sharding

__all__ = ["InnerRuns", "learned_optimizer"]

Horizon = int | Callable[[Array], Array]
LossTransform = Literal["none", "log", "relative"]

_DIVERGED = 1e12
"""A loss counts as this at most, and is then constant to every derivative: an instance
that diverges cannot make the gradient of the others NaN."""

_TINY = 1e-12  # keeps log and division of a loss finite


class InnerRuns(NamedTuple):
    """The carry: where each task's inner training is. Every leaf leads with [T]."""

    params: PyTree  # with "pes" [T, 2, ...], one for each sign of the perturbation
    rule_state: PyTree  # likewise
    task: PyTree
    first_loss: Array  # [T] at theta_0
    inner_step: Array  # int32 [T] updates done; -1 - k: start afresh, as if k were done
    meta_step: Array  # int32 [T] meta-steps done, the same for all
    shift: PyTree  # "pes": sum of the perturbations since the start; otherwise ()


def learned_optimizer(
    family: ProblemFamily,
    rule: UpdateRule,
    *,
    num_tasks: int,
    unroll_steps: int = 20,
    horizon: Horizon = 100,
    second_order: bool = False,
    weights: Callable[[Array], Array] | None = None,
    loss_transform: LossTransform = "none",
    estimator: Literal["backprop", "pes"] = "backprop",
    pes_std: float = 0.01,
    stagger: bool = False,
    memory: Memory = "mixed",
    scan_unroll: int = 1,
    task_mapping: TaskMapping | Literal["stacked"] | None = None,
) -> MetaAlgorithm:
    r"""Train ``rule`` to train the problems of ``family``.

    A segment's objective, whose mean over tasks is the meta-loss, is the mean of

    .. math:: w_t \, \phi(L(\theta_t)), \qquad t = s + 1, \ldots, s + K

    over the updates of the segment that starts at step s (Andrychowicz et al., 2016,
    equation 3), phi being ``loss_transform``. The meta-parameters are the rule's. Train
    it with `metalstm.make_train_loop` and a `ProblemSampler` of the same family; the
    number of batches is set here.

    ``estimator="backprop"`` differentiates each segment, with theta_s and the rule's
    state constants: cheap, and biased where a segment's updates show their worth later.
    ``"pes"`` is persistent evolution strategies (Vicol et al., 2021, equation 10): each
    task runs twice, under meta-parameters perturbed by :math:`\pm\epsilon` drawn anew
    in every segment, and

    .. math:: \hat g = \xi \, (O^+ - O^-) / (2 \sigma^2), \qquad \xi = \sum \epsilon

    with the sum over the segments since the task began: unbiased over the whole horizon
    (of the objective smoothed by the noise), at the price of variance.

    Args:
      num_tasks: T, problems in training at once; the trainer's ``num_tasks``.
      unroll_steps: K.
      horizon: updates after which a task starts again from a new instance; an int, or a
        function of the meta-step (traced: a curriculum compiles nothing twice), of
        which the next multiple of K counts.
      second_order: differentiate through the inner gradients. "pes" has no use for it.
      weights: inner step t = 1, 2, ... -> w_t, elementwise. None: 1.
      loss_transform: "none"; "log", which weighs digits gained alike at any height;
        "relative" divides by the instance's loss at theta_0.
      pes_std: sigma.
      stagger: let the first runs end at different times, so that every meta-step sees
        all phases of training.
      memory: what a segment keeps for its backward pass; `metalstm.inner.Memory`. To
        compute the rule again needs less memory and is, on a CPU, faster.
      scan_unroll: see `metalstm.inner.unroll`.
      task_mapping: "stacked" runs all tasks as one problem whose parameters are theirs
        end to end, so that a rule's matrix product is one for all of them. Only for a
        coordinate-wise rule that does not read the loss, and "backprop". Otherwise see
        `metalstm.base.map_tasks`. None: stacked where possible, else "vmap".

    Raises:
      ValueError: an argument outside these choices, a horizon that is no multiple of
        ``unroll_steps``, or (from ``init``) tasks that cannot be stacked.
    """
    _check(num_tasks, unroll_steps, horizon, loss_transform, estimator, pes_std)
    pes = estimator == "pes"
    if second_order and not pes and not rule.smooth:
        check_differentiable(rule)
    if task_mapping == "stacked" and (pes or not _one_for_all(rule)):
        raise ValueError(
            "task_mapping='stacked' needs a coordinate-wise rule that does not read "
            "the loss, and estimator='backprop': leave task_mapping out"
        )
    segment = _segment(
        rule,
        unroll_steps,
        # differentiated through the rule alone, or not at all
        second_order=second_order or pes,
        memory="plain" if pes else memory,
        coordinatewise=rule.coordinatewise,
        scan_unroll=scan_unroll,
    )

    def objective(losses: Array, runs: InnerRuns) -> tuple[Array, Array]:
        """Losses [K + 1, ...] of one task, or of all: the mean, and L(theta_0)."""
        started = runs.inner_step == 0
        first = jnp.where(started, lax.stop_gradient(losses[0]), runs.first_loss)
        terms = _transformed(loss_transform, losses[1:], first)
        if weights is not None:
            steps = jnp.arange(1, unroll_steps + 1)
            steps = steps.reshape(-1, *(1,) * first.ndim) + runs.inner_step
            terms = terms * weights(steps)
        return terms.mean(), first

    def init(key: Array, draw: Draw) -> PyTree:
        return rule.init(key, draw.params)

    def init_carry(key: Array, meta_params: PyTree, draw: Draw) -> InnerRuns:
        del key
        tx = rule.bind(meta_params)
        rows = (num_tasks, 2) if pes else (num_tasks,)
        tile = lambda tree, rows: jax.tree.map(  # noqa: E731
            lambda x: jnp.broadcast_to(x, rows + jnp.shape(x)), tree
        )
        phases = jnp.zeros(num_tasks, jnp.int32)
        if stagger:
            at_first = horizon(jnp.int32(0)) if callable(horizon) else horizon
            segments = jnp.asarray(at_first, jnp.int32) // unroll_steps
            phases = unroll_steps * (jnp.arange(num_tasks) * segments // num_tasks)
        zeros = jax.tree.map(jnp.zeros_like, meta_params) if pes else ()
        return InnerRuns(
            params=tile(draw.params, rows),
            rule_state=tile(tx.init(draw.params), rows),
            task=tile(draw.task, rows[:1]),
            first_loss=jnp.ones(num_tasks),
            inner_step=-1 - phases.astype(jnp.int32),
            meta_step=jnp.zeros(num_tasks, jnp.int32),
            shift=tile(zeros, rows[:1]),
        )

    def restart(meta_params: PyTree, runs: InnerRuns, draws: Draw, lockstep: bool):
        """Put new instances where a task has come to its end."""
        limit = horizon(runs.meta_step[0]) if callable(horizon) else horizon
        over = (runs.inner_step < 0) | (runs.inner_step >= limit)
        if lockstep:
            over = jnp.broadcast_to(over.any(), over.shape)
        params = draws.params
        rule_state = jax.vmap(rule.bind(meta_params).init)(params)
        if pes:
            twice = lambda x: jnp.stack([x, x], 1)  # noqa: E731
            params, rule_state = jax.tree.map(twice, (params, rule_state))
        fresh = runs._replace(
            params=params,
            rule_state=rule_state,
            task=draws.task,
            inner_step=jnp.where(runs.inner_step < 0, -1 - runs.inner_step, 0),
            shift=jax.tree.map(jnp.zeros_like, runs.shift),
        )
        pick = lambda new, old: jnp.where(  # noqa: E731
            over.reshape(-1, *(1,) * (new.ndim - 1)), new, old
        )
        return jax.tree.map(pick, fresh, runs)

    def by_backprop(meta_params: PyTree, key: Array, runs: InnerRuns, batches: PyTree):
        del key

        def fn(meta_params):
            losses, inner = segment(
                meta_params,
                runs.params,
                runs.rule_state,
                lambda params, batch: _bounded(family.loss(params, runs.task, batch)),
                batches,
            )
            value, first = objective(losses, runs)
            return value, (value, losses, first, inner)

        grads, (value, losses, first, inner) = jax.grad(fn, has_aux=True)(meta_params)
        runs = runs._replace(
            params=inner.params, rule_state=inner.rule_state, first_loss=first
        )
        return grads, value, losses, runs

    def by_stacking(meta_params: PyTree, keys: Array, runs: InnerRuns, batches: PyTree):
        """`by_backprop` of all tasks at once, as one problem of T N coordinates."""
        del keys
        like = jax.tree.map(lambda x: x[0], runs.params)
        batches = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)

        def losses_of(flat: Array, batch: PyTree) -> Array:  # [T, N] -> [T]
            one = lambda row, task, batch: _bounded(  # noqa: E731
                family.loss(unflatten(row, like), task, batch)
            )
            return jax.vmap(one)(flat, runs.task, batch)

        def fn(meta_params):
            losses, inner = segment(
                meta_params,
                jax.vmap(flatten)(runs.params),
                _stack(runs.rule_state),
                losses_of,
                batches,
            )
            value, first = objective(losses, runs)
            return value, (value, losses, first, inner)

        grads, (value, losses, first, inner) = jax.grad(fn, has_aux=True)(meta_params)
        runs = runs._replace(
            params=jax.vmap(lambda row: unflatten(row, like))(inner.params),
            rule_state=_unstack(inner.rule_state, runs.rule_state),
            first_loss=first,
        )
        return grads, value, losses.T, runs

    def by_evolution(meta_params: PyTree, key: Array, runs: InnerRuns, batches: PyTree):
        noise = _noise(key, meta_params, pes_std)
        shift = jax.tree.map(jnp.add, runs.shift, noise)

        def one_sign(sign, params, rule_state):
            losses, inner = segment(
                jax.tree.map(lambda w, e: w + sign * e, meta_params, noise),
                params,
                rule_state,
                lambda params, batch: _bounded(family.loss(params, runs.task, batch)),
                batches,
            )
            return *objective(losses, runs), losses, inner

        signs = jnp.array([1.0, -1.0])
        values, first, losses, inner = _map_pair(
            one_sign, signs, runs.params, runs.rule_state
        )
        # a pair that diverged says nothing about the slope
        slope = (values[0] - values[1]) / (2 * pes_std**2)
        slope = jnp.where((losses < _DIVERGED).all(), slope, 0.0)
        runs = runs._replace(
            params=inner.params,
            rule_state=inner.rule_state,
            first_loss=first.mean(),
            shift=shift,
        )
        return slope, values.mean(), losses.mean(0), runs

    def meta_gradient(meta_params, carry: InnerRuns, keys: Array, draws: Draw):
        _check_batches(draws, unroll_steps)
        layout = task_mapping
        shared = _shared_state(rule, meta_params, draws.params)
        can = not pes and _one_for_all(rule) and shared is not None
        if layout is None:
            stackable = can and not (shared and stagger)
            layout = "stacked" if stackable else "vmap"
        if layout == "stacked" and (not can or (shared and stagger)):
            raise ValueError(
                "task_mapping='stacked': the rule's state is not the same for one "
                "large problem as for several small ones, or tasks that start at "
                "different times share it: leave task_mapping out"
            )
        lockstep = layout == "stacked" and bool(shared)
        runs = restart(meta_params, carry, draws, lockstep)
        if layout == "stacked":
            grads, value, losses, runs = by_stacking(
                meta_params, keys, runs, draws.batches
            )
        else:
            one = by_evolution if pes else by_backprop
            how = "unroll" if keys.shape[0] == 1 else layout
            grads, value, losses, runs = map_tasks(
                lambda *xs: one(meta_params, *xs), keys, runs, draws.batches, how=how
            )
            if pes:  # so far [T] slopes, along each task's shift
                along = grads / grads.shape[0]
                grads = jax.tree.map(lambda xi: jnp.tensordot(along, xi, 1), runs.shift)
            else:
                grads = jax.tree.map(lambda g: g.mean(0), grads)
        diverged = (losses >= _DIVERGED).any(-1)  # [T]
        step = runs.inner_step + unroll_steps
        runs = runs._replace(
            inner_step=step if lockstep else jnp.where(diverged, -1, step),
            meta_step=runs.meta_step + 1,
        )
        metrics = {
            "loss": value.mean(),
            "inner_loss": losses[:, 1:].mean(),
            "diverged": diverged.mean(),
        }
        return grads, runs, metrics

    def train_sampler(spec: Any) -> Any:
        if not isinstance(spec, ProblemSampler):
            return spec
        if spec.family != family:
            raise ValueError(
                "the sampler draws problems of another family than the one "
                "learned_optimizer was given: build both from the same"
            )
        return dataclasses.replace(spec, num_batches=unroll_steps + 1)

    return make_algorithm(
        init=init,
        predict=_no_predict,
        init_carry=init_carry,
        meta_gradient=meta_gradient,
        train_sampler=train_sampler,
        per_task_carry=True,
    )


def _map_pair(fn: Callable, *args: PyTree) -> PyTree:
    """``fn`` of each of two, the leading axis; by two devices if they share a task."""
    devices = sharding.coordinate_devices()
    if devices == 1:
        # on a CPU one after the other: XLA computes a single product on all cores
        return map_tasks(fn, *args)
    own = lax.axis_index(sharding.COORDINATE) % 2
    out = fn(*jax.tree.map(lambda leaf: leaf[own], args))
    return jax.tree.map(lambda leaf: sharding.collect(leaf)[:2], out)


def _segment(rule: UpdateRule, num_steps: int, **options) -> Callable:
    def segment(meta_params, params, rule_state, loss_fn, batches):
        """K updates: the losses [K + 1, ...] at theta_s .. theta_{s+K}, the end."""
        inner, trace = unroll(
            lambda params, stats, batch, key: (loss_fn(params, batch), stats),
            rule.bind(meta_params),
            InnerState(params, (), rule_state),
            jax.tree.map(lambda x: x[:-1], batches),
            num_steps=num_steps,
            **options,
        )
        last = loss_fn(inner.params, jax.tree.map(lambda x: x[-1], batches))
        return jnp.concatenate([trace.losses, last[None]]), inner

    return segment


def _bounded(loss: Array) -> Array:
    return jnp.where(loss < _DIVERGED, loss, _DIVERGED)  # NaN is not below it


def _transformed(how: LossTransform, losses: Array, first: Array) -> Array:
    if how == "log":
        return jnp.log(losses + _TINY)
    if how == "relative":
        return losses / (first + _TINY)
    return losses


def _noise(key: Array, like: PyTree, std: float) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        std * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)


def _one_for_all(rule: UpdateRule) -> bool:
    return rule.coordinatewise and not rule.reads_loss


def _shared_state(rule: UpdateRule, meta_params: PyTree, params: PyTree) -> bool | None:
    """Whether a stacked rule state has parts that no task has of its own.

    ``params`` lead with [T]. None: it cannot be taken apart into the tasks' states, by
    the convention that the last axis is the coordinates'.
    """
    leaves = jax.tree.leaves(params)
    if {leaf.dtype for leaf in leaves} != {coordinate_dtype(params)}:
        return None
    num_tasks = leaves[0].shape[0]
    size = sum(leaf[0].size for leaf in leaves)
    init = rule.bind(meta_params).init
    flat = jax.ShapeDtypeStruct((num_tasks, size), leaves[0].dtype)
    stacked = jax.eval_shape(init, flat)
    own = jax.eval_shape(init, jax.tree.map(lambda x: x[0], params))
    if len({jax.tree.structure(stacked), jax.tree.structure(own)}) > 1:
        return None
    shared = False
    for whole, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(own), strict=True):
        if part.ndim == 0 and whole.ndim == 0:
            shared = True
        elif part.shape[-1:] != (size,) or whole.shape != (
            *part.shape[:-1],
            num_tasks * size,
        ):
            return None
    return shared


def _stack(states: PyTree) -> PyTree:
    """[T, ..., N] -> [..., T N], the state of one large problem; scalars are shared."""

    def one(x: Array) -> Array:
        if x.ndim == 1:
            return x[0]
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)

    return jax.tree.map(one, states)


def _unstack(state: PyTree, like: PyTree) -> PyTree:
    """The inverse of `_stack`; ``like`` leads with [T]."""

    def one(x: Array, ref: Array) -> Array:
        if ref.ndim == 1:
            return jnp.broadcast_to(x, ref.shape)
        x = x.reshape(*x.shape[:-1], ref.shape[0], ref.shape[-1])
        return jnp.moveaxis(x, -2, 0)

    return jax.tree.map(one, state, like)


def _no_predict(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "a learned optimizer predicts nothing: bind its rule to the meta-parameters, "
        "rule.bind(params), and use it as any optax optimizer"
    )


def _check_batches(draws: Draw, unroll_steps: int) -> None:
    for leaf in jax.tree.leaves(draws.batches):
        if leaf.shape[1] != unroll_steps + 1:
            raise ValueError(
                f"a draw has {leaf.shape[1]} batches but unroll_steps={unroll_steps}: "
                f"one for each update and one behind the last, {unroll_steps + 1}"
            )


def _check(num_tasks, unroll_steps, horizon, loss_transform, estimator, pes_std):
    for name, value in (("num_tasks", num_tasks), ("unroll_steps", unroll_steps)):
        if value < 1:
            raise ValueError(f"{name}={value}: choose at least 1")
    if not callable(horizon) and (horizon < 1 or horizon % unroll_steps):
        raise ValueError(
            f"horizon={horizon} is not a multiple of unroll_steps={unroll_steps}"
        )
    for name, value, choices in (
        ("loss_transform", loss_transform, ("none", "log", "relative")),
        ("estimator", estimator, ("backprop", "pes")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
    if pes_std <= 0:
        raise ValueError(f"pes_std={pes_std}: choose a standard deviation above 0")
