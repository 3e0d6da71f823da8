"""Meta-train an update rule on problems: truncated back-propagation, or evolution.

Notation: T tasks (problems in training at once), K updates a segment.

A task's inner training is cut into segments of K updates and continues from one
meta-step to the next: the carry holds its parameters and the rule's state. Full
back-propagation is K = horizon.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from metalstm.algorithms.common import make_algorithm
from metalstm.base import Array, MetaAlgorithm, PyTree, UpdateRule
from metalstm.checks import check_at_least, check_choice, check_positive, check_share
from metalstm.inner import Differentiation, first_order
from metalstm.learned_optimizers.estimators import (
    DIVERGED,
    NOT_YET,
    Estimate,
    Horizon,
    InnerRuns,
    LossTransform,
    Settings,
    backprop,
    evolution,
    stacked_backprop,
)
from metalstm.learned_optimizers.problems import Draw, ProblemFamily, ProblemSampler
from metalstm.rules import as_rule, flat, with_progress
from metalstm.rules.classic import check_differentiable
from metalstm.tasks import TaskMapping, map_tasks, mean_over_tasks

__all__ = ["InnerRuns", "learned_optimizer"]

_START = 104_729  # folded into a task's key: what a run that starts draws


def learned_optimizer(
    family: ProblemFamily,
    rule: UpdateRule | optax.GradientTransformation,
    *,
    num_tasks: int,
    unroll_steps: int = 20,
    horizon: Horizon = 100,
    differentiation: Differentiation = first_order(keep="mixed"),  # noqa: B008 (a value)
    weights: Callable[[Array], Array] | None = None,
    loss_transform: LossTransform = "none",
    estimator: Literal["backprop", "pes"] = "backprop",
    pes_std: float = 0.01,
    stagger: bool = False,
    tell_progress: float = 0.0,
    scan_unroll: int = 1,
    task_mapping: TaskMapping | Literal["stacked"] | None = None,
    axis_name: str | None = None,
) -> MetaAlgorithm:
    r"""Train ``rule`` to train the problems of ``family``.

    A segment's objective, whose mean over tasks is the meta-loss, is the mean of

    .. math:: w_t \, \phi(L(\theta_t)), \qquad t = s + 1, \ldots, s + K

    over the updates of the segment that starts at step s (Andrychowicz et al., 2016,
    equation 3), phi being ``loss_transform``. The meta-parameters are the rule's. Train
    it with `metalstm.make_train_loop` and a `ProblemSampler` of the same family; the
    number of batches is set here.

    ``estimator="backprop"`` differentiates each segment, with theta_s and the rule's
    state constants: cheap, and biased where updates pay off only after their segment.
    ``"pes"`` is persistent evolution strategies (Vicol et al., 2021, equation 10): each
    task runs twice, under meta-parameters perturbed by :math:`\pm\epsilon` drawn again
    in every segment, and

    .. math:: \hat g = \xi \, (O^+ - O^-) / (2 \sigma^2), \qquad \xi = \sum \epsilon

    with the sum over the segments since the task began: unbiased over the whole horizon
    (of the objective smoothed by the noise), at the price of variance.

    Args:
      num_tasks: T, problems in training at once; the trainer's ``num_tasks``.
      unroll_steps: K, updates of a segment, which are differentiated together.
      horizon: updates after which a task starts again from a new instance, a multiple
        of K; or (low, high), between which each run draws its length log-uniformly; or
        a function of the meta-step at which a run starts (traced: a curriculum compiles
        nothing twice). Of the latter two the next multiple of K counts.
      differentiation: `metalstm.first_order` or `metalstm.second_order`, of a segment.
        Recomputing the rule needs less memory and is faster on a CPU. "pes"
        differentiates nothing.
      weights: share of the run that is done, t / length in (0, 1], -> w_t,
        elementwise. None: 1.
      loss_transform: "none"; "log", so that equal ratios of losses count the same;
        "relative" divides by the instance's loss at theta_0; "log_relative" is the log
        of that plus 0.001, so that a loss near zero does not outweigh the others.
      estimator: "backprop" or "pes".
      pes_std: sigma, of the perturbations of "pes".
      stagger: make the first runs shorter, each by another share, so that later
        meta-steps see all phases of training.
      tell_progress: share of the runs whose rule is told its progress, as by
        `metalstm.rules.with_progress`; the others' length stays unknown to it. 0: the
        rule is called without.
      scan_unroll: see `metalstm.inner.unroll`.
      task_mapping: "stacked" runs all tasks as one problem whose parameters are theirs
        end to end, so that a rule's matrix product is one for all of them. Only for a
        coordinate-wise rule that does not read the loss, and "backprop". Otherwise see
        `metalstm.tasks.map_tasks`. None: stacked where possible, else "vmap".
      axis_name: a mesh axis whose devices share each task: its coordinates, as in
        `metalstm.inner.unroll`, or the two runs of "pes".

    Raises:
      ValueError: an argument outside these choices, a horizon that is no multiple of
        ``unroll_steps``, or (from the meta-gradient) tasks that cannot be stacked.
    """
    rule = as_rule(rule)
    if tell_progress:
        rule = _told(rule)
    settings = Settings(
        family,
        rule,
        num_tasks,
        unroll_steps,
        horizon,
        differentiation,
        weights,
        loss_transform,
        estimator,
        pes_std,
        stagger,
        tell_progress,
        scan_unroll,
        task_mapping,
        axis_name,
    )
    _check(settings)
    return make_algorithm(
        init=functools.partial(_init, settings),
        predict=_no_predict,
        init_carry=functools.partial(_init_carry, settings),
        meta_gradient=functools.partial(_meta_gradient, settings),
        train_sampler=functools.partial(_train_sampler, settings),
        per_task_carry=True,
    )


def _check(settings: Settings) -> None:
    rule, horizon, steps = settings.rule, settings.horizon, settings.unroll_steps
    check_at_least("num_tasks", settings.num_tasks, 1)
    check_at_least("unroll_steps", steps, 1)
    if isinstance(horizon, tuple):
        if not 1 <= horizon[0] <= horizon[1]:
            raise ValueError(f"horizon={horizon}: give 1 <= low <= high")
    elif not callable(horizon) and (horizon < 1 or horizon % steps):
        raise ValueError(f"horizon={horizon} is not a multiple of unroll_steps={steps}")
    if settings.tell_progress:
        check_share("tell_progress", settings.tell_progress)
    check_choice("loss_transform", settings.loss_transform, get_args(LossTransform))
    check_choice("estimator", settings.estimator, ("backprop", "pes"))
    check_positive("pes_std", settings.pes_std)
    is_pes = settings.estimator == "pes"
    if settings.task_mapping == "stacked" and (is_pes or not _may_be_stacked(rule)):
        raise ValueError(
            "task_mapping='stacked' needs a coordinate-wise rule that does not read "
            "the loss, and estimator='backprop': omit task_mapping"
        )


def _init(settings: Settings, key: Array, draw: Draw) -> PyTree:
    if settings.differentiation.order == "second" and settings.estimator != "pes":
        check_differentiable(settings.rule, draw.params)
    return settings.rule.init(key, draw.params)


def _told(rule: UpdateRule) -> UpdateRule:
    """Call the rule with its progress; `_restart` sets the length of each run."""
    traits = rule.traits._replace(coordinatewise=False)  # all share a counter
    return UpdateRule(
        rule.init, lambda params: with_progress(rule.bind(params), None), traits
    )


def _may_be_stacked(rule: UpdateRule) -> bool:
    return rule.traits.coordinatewise and not rule.traits.reads_loss


def _init_carry(
    settings: Settings, key: Array, meta_params: PyTree, draw: Draw
) -> InnerRuns:
    num_tasks = settings.num_tasks
    is_pes = settings.estimator == "pes"
    rows = (num_tasks, 2) if is_pes else (num_tasks,)

    def tile(tree: PyTree, rows: tuple[int, ...]) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, rows + jnp.shape(x)), tree)

    lengths = _lengths(settings, jax.random.split(key, num_tasks), jnp.int32(0))
    if settings.stagger:  # shorter first runs, which know that they are
        segments = lengths // settings.unroll_steps
        segments = -(-segments * jnp.arange(1, num_tasks + 1) // num_tasks)
        lengths = segments * settings.unroll_steps
    zeros = jax.tree.map(jnp.zeros_like, meta_params) if is_pes else ()
    rule_state = settings.rule.bind(meta_params).init(draw.params)
    return InnerRuns(
        params=tile(draw.params, rows),
        rule_state=tile(rule_state, rows),
        task=tile(draw.task, rows[:1]),
        first_loss=jnp.full(num_tasks, NOT_YET, jnp.result_type(float)),
        inner_step=jnp.full(num_tasks, -1, jnp.int32),
        length=lengths,
        meta_step=jnp.zeros(num_tasks, jnp.int32),
        shift=tile(zeros, rows[:1]),
    )


def _lengths(settings: Settings, keys: Array, meta_step: Array) -> Array:
    """Draw how many updates runs that start now make: int32 [T], multiples of K."""
    horizon, unroll_steps = settings.horizon, settings.unroll_steps
    if isinstance(horizon, tuple):
        low, high = (math.log(limit) for limit in horizon)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), float, low, high))
        drawn = jnp.minimum(jnp.exp(uniform(keys)), horizon[1])  # which rounds
    else:
        limit = horizon(meta_step) if callable(horizon) else horizon
        drawn = jnp.broadcast_to(jnp.asarray(limit), keys.shape)
    return jnp.ceil(drawn / unroll_steps).astype(jnp.int32) * unroll_steps


def _meta_gradient(
    settings: Settings, meta_params: PyTree, carry: InnerRuns, keys: Array, draws: Draw
) -> tuple[PyTree, InnerRuns, dict[str, Array]]:
    """One segment of each task: the mean gradient, and where the tasks are then."""
    _check_batches(draws, settings.unroll_steps)
    layout, per_coordinate = _layout(settings, meta_params, draws.params)
    # stacked tasks that share a part of the rule's state begin and end together
    lockstep = layout == "stacked" and not all(jax.tree.leaves(per_coordinate))
    runs = _restart(settings, meta_params, carry, keys, draws, lockstep)
    if layout == "stacked":
        grads, estimates = stacked_backprop(
            settings, meta_params, runs, draws.batches, per_coordinate
        )
        return grads, *_after(settings, estimates, lockstep)
    how = "unroll" if keys.shape[0] == 1 else layout
    args = keys, runs, draws.batches
    if settings.estimator == "pes":
        one = functools.partial(evolution, settings, meta_params)
        slopes, estimates = map_tasks(one, *args, how=how)
        along = slopes / len(slopes)  # one product, and no gradient for each task
        grads = jax.tree.map(
            lambda xi: jnp.tensordot(along.astype(xi.dtype), xi, 1),
            estimates.runs.shift,
        )
    else:
        grads, estimates = mean_over_tasks(
            lambda _, *xs: backprop(settings, meta_params, *xs),
            *args,
            how=how,
            has_per_task=True,
        )
    return grads, *_after(settings, estimates, lockstep)


def _after(
    settings: Settings, estimates: Estimate, lockstep: bool
) -> tuple[InnerRuns, dict[str, Array]]:
    value, losses, runs = estimates
    diverged = (losses >= DIVERGED).any(-1)  # [T]
    step = runs.inner_step + settings.unroll_steps
    restarts = diverged.all() if lockstep else diverged
    # not one finite loss from theta_0 on: it is the problem, and `fit` shall say so
    is_broken = jnp.all(runs.inner_step == 0) & (losses >= DIVERGED).all()
    runs = runs._replace(
        inner_step=jnp.where(restarts, -1, step),
        meta_step=runs.meta_step + 1,
    )
    metrics = {
        "loss": jnp.where(is_broken, jnp.nan, value.mean()),
        "inner_loss": losses[:, 1:].mean(),
        "diverged": diverged.mean(),
        "above_start": (losses[:, -1] > runs.first_loss).mean(),
    }
    return runs, metrics


def _layout(
    settings: Settings, meta_params: PyTree, params: PyTree
) -> tuple[TaskMapping | Literal["stacked"], PyTree | None]:
    """How to lay out the tasks; if stacked, which leaves of a state are coordinates'.

    ``params`` lead with [T].
    """
    layout, rule = settings.task_mapping, settings.rule
    per_coordinate = None
    leaves = jax.tree.leaves(params)
    same_dtype = {leaf.dtype for leaf in leaves} == {flat.coordinate_dtype(params)}
    if settings.estimator == "backprop" and _may_be_stacked(rule) and same_dtype:
        per_coordinate = flat.per_coordinate_leaves(
            rule.bind(meta_params).init, jax.tree.map(lambda x: x[0], params)
        )
    can_stack = per_coordinate is not None
    starts_differ = settings.stagger or isinstance(settings.horizon, tuple)
    if can_stack and starts_differ:  # a shared part would be at one phase for all
        can_stack = all(jax.tree.leaves(per_coordinate))
    if layout is None:
        layout = "stacked" if can_stack else "vmap"
    if layout == "stacked" and not can_stack:
        raise ValueError(
            "task_mapping='stacked': the rule's state is not the same for one large "
            "problem as for several small ones, or tasks that start at different times "
            "share it: omit task_mapping"
        )
    return layout, per_coordinate


def _restart(
    settings: Settings,
    meta_params: PyTree,
    runs: InnerRuns,
    keys: Array,
    draws: Draw,
    lockstep: bool,
) -> InnerRuns:
    """Put new instances where a task has come to its end."""
    over = (runs.inner_step < 0) | (runs.inner_step >= runs.length)
    if lockstep:
        over = jnp.broadcast_to(over.any(), over.shape)
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, _START)))(keys)
    drawn = _lengths(settings, keys[:, 0], runs.meta_step[0])
    length = jnp.where(runs.meta_step == 0, runs.length, drawn)
    params = draws.params
    rule_state = jax.vmap(settings.rule.bind(meta_params).init)(params)
    if settings.tell_progress:
        share = settings.tell_progress
        told = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys[:, 1])
        num_steps = jnp.where(told, length, 0).astype(jnp.float32)
        rule_state = rule_state._replace(num_steps=num_steps)
    if settings.estimator == "pes":
        twice = lambda x: jnp.stack([x, x], 1)  # noqa: E731
        params, rule_state = jax.tree.map(twice, (params, rule_state))
    fresh = runs._replace(
        params=params,
        rule_state=rule_state,
        task=draws.task,
        first_loss=jnp.full_like(runs.first_loss, NOT_YET),
        inner_step=jnp.zeros_like(runs.inner_step),
        length=length,
        shift=jax.tree.map(jnp.zeros_like, runs.shift),
    )
    pick = lambda new, old: jnp.where(  # noqa: E731
        over.reshape(-1, *(1,) * (new.ndim - 1)), new, old
    )
    return jax.tree.map(pick, fresh, runs)


def _train_sampler(settings: Settings, spec: Any) -> Any:
    if not isinstance(spec, ProblemSampler):
        return spec
    if spec.family != settings.family:
        raise ValueError(
            "the sampler draws problems of another family than the one "
            "learned_optimizer was given: build both from the same"
        )
    return dataclasses.replace(spec, num_batches=settings.unroll_steps + 1)


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
                f"one for each update and one after the last, {unroll_steps + 1}"
            )
