"""Reptile: meta-train by the displacement of the inner loop, not by a query loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from metalstm.algorithms.common import accuracy, resampled
from metalstm.algorithms.gradient.adaptation import support_metrics
from metalstm.algorithms.gradient.engine import learned_init, with_gradient_of_init
from metalstm.base import (
    Array,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    Norm,
    PyTree,
    UpdateRule,
)
from metalstm.checks import check_choice
from metalstm.inner import first_order
from metalstm.records import recorded
from metalstm.rules import as_rule

__all__ = ["reptile"]

_TEST_STEPS = 50


@recorded("algorithm")
def reptile(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation | float = 1e-3,
    *,
    num_steps: int = 5,
    num_test_steps: int | None = None,
    batch_size: int | None = None,
    test_batch_size: int | None = None,
    train_shots: int | None = None,
    rule_state: Literal["restarted", "continued"] = "restarted",
    gradient_weights: Sequence[float] | Array | None = None,
    **options: Any,
) -> MetaAlgorithm:
    """Reptile (Nichol et al., 2018): move theta_0 towards where tasks end.

    The meta-gradient is the mean over tasks of theta_0 - theta_T (algorithm 2), so that
    SGD with the rate epsilon takes the paper's step, theta_0 + epsilon (mean theta_T -
    theta_0). One task in a meta-step is the serial version (algorithm 1), several the
    batched one. Any outer optimizer works; published: epsilon from 1 to 0.

    Args:
      learner: as in `learned_init`. A head whose classes share their start moves by
        their mean.
      rule: the inner rule; a number is Adam's rate with beta1 = 0. A rule's own
        parameters are not learned.
      num_steps, num_test_steps: T in meta-training and at meta-test. None: 50, as
        published.
      batch_size, test_batch_size: images in one update. Published: 10, of which an
        epoch has several. None: the whole support set.
      train_shots: images of each class in meta-training, when they differ from the
        test's. Published: 10 (Omniglot) or 15 (mini-ImageNet). The query set has one.
      rule_state: where Adam's averages, or another rule's state, start in a task:
        afresh, or, as in the authors' code, where the last meta-step's tasks left them,
        at meta-test too. It is then part of the meta-parameters.
      gradient_weights: w [num_steps]: the meta-gradient is the sum of w_t g_t, g_t the
        inner loop's gradient at update t, instead of theta_0 - theta_T (the paper's
        figure 3). With SGD inside, all ones give (theta_0 - theta_T) / rate, and 1 for
        g_1 alone is the gradient of joint training on all tasks. May be traced.
      options: further arguments of `learned_init`; ``train_queries`` and
        ``train_query_norm`` change nothing, as no query is learned from.

    Raises:
      ValueError: ``query_norm="frozen"`` unless ``frozen_stats="kept"``, since averages
        are not gathered here;
        ``gradient_weights`` of another length than ``num_steps``; another
        ``rule_state``.
    """
    check_choice("rule_state", rule_state, ("restarted", "continued"))
    norms = options.get("query_norm"), options.get("train_query_norm")
    if "frozen" in norms and options.get("frozen_stats") != "kept":
        raise ValueError(
            "reptile gathers no averages over meta-training for query_norm='frozen': "
            "choose support, support+1 or transductive, or frozen_stats='kept' and a "
            "trained start"
        )
    if not isinstance(rule, UpdateRule | optax.GradientTransformation):
        rule = optax.adam(rule, b1=0.0)
    rule, continues = as_rule(rule), rule_state == "continued"
    if continues:
        rule = _continuing(rule)
    train_way: Any = options.get("train_way")
    fixed: dict[str, Any] = {"differentiation": first_order(), **options}
    recorded, sums = rule, gradient_weights is not None
    if sums:
        weights = jnp.asarray(gradient_weights, jnp.float32)
        if weights.shape != (num_steps,):
            raise ValueError(
                f"gradient_weights has shape {weights.shape} but num_steps={num_steps}:"
                " give one weight for each update"
            )
        recorded = _summing_gradients(rule, weights)
    inner = learned_init(
        learner, recorded, num_steps=num_steps, batch_size=batch_size, **fixed
    )
    adapt = cast(Any, inner.adapt)
    tested = learned_init(
        learner,
        rule,
        num_steps=_TEST_STEPS if num_test_steps is None else num_test_steps,
        batch_size=test_batch_size,
        **fixed,
    )

    def one_task(meta_params: MetaParams, key: Array, episode: Episode):
        support, query = episode
        end, trace = adapt(meta_params, key, support, num_classes=train_way)
        state = meta_params.learner
        frozen = options.get("query_norm") == "frozen"
        stats = state.stats if frozen else end.stats
        adapted = LearnerState(end.params, stats, state.other)
        norm: Norm = "stored" if frozen else "batch"
        outputs, _ = learner.apply(adapted, query.x, norm=norm)
        metrics = {
            "loss": trace.losses.mean(),
            "accuracy": accuracy(outputs, query.y),
            **support_metrics(trace, batch_size),
        }
        sums_of_rule = _part(end.rule_state, _Summing).total if sums else None
        move = _displacement(learner, train_way, state.params, end.params, sums_of_rule)
        after = _after(meta_params.rule, end.rule_state) if continues else ()
        return (move, after), metrics

    return with_gradient_of_init(
        tested,
        one_task,
        train_sampler=resampled(way=train_way, shot=train_shots, queries=1),
        task_mapping=options.get("task_mapping"),
        carries_rule=continues,
    )


def _displacement(
    learner: Learner,
    way: int | None,
    start: PyTree,
    end: PyTree,
    summed_gradients: PyTree | None,
) -> PyTree:
    """theta_0 - theta_T, or the summed gradients, shaped like the learned theta_0."""

    def moved(from_: PyTree) -> PyTree:
        if summed_gradients is not None:
            return summed_gradients
        return jax.tree.map(jnp.subtract, from_, end)

    if learner.at_way is None or way is None:
        return moved(start)
    # a head whose classes share their start moves by the mean of their moves
    at_way = learner.at_way
    repeated, pull_back = jax.vjp(lambda p: at_way(p, way), start)
    (total,) = pull_back(moved(repeated))
    (copies,) = pull_back(jax.tree.map(jnp.ones_like, repeated))
    return jax.tree.map(jnp.divide, total, copies)


class _Summing(NamedTuple):
    inner: PyTree  # the rule's own state
    step: Array
    total: PyTree  # sum of w_t g_t so far


def _summing_gradients(rule: UpdateRule, weights: Array) -> UpdateRule:
    """The same rule, whose state also sums the gradients it is given, weighed."""

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        tx = rule.bind(rule_params)

        def init_fn(params: PyTree) -> _Summing:
            zeros = jax.tree.map(jnp.zeros_like, params)
            return _Summing(tx.init(params), jnp.int32(0), zeros)

        def update_fn(updates, state: _Summing, params=None, **extra):
            weight = weights[state.step]
            total = jax.tree.map(
                lambda sum_, g: sum_ + weight.astype(g.dtype) * g, state.total, updates
            )
            updates, inner = tx.update(updates, state.inner, params, **extra)
            return updates, _Summing(inner, state.step + 1, total)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = rule.traits._replace(coordinatewise=False)  # its state is a tree
    return UpdateRule(rule.init, bind, traits)


class _Continued(NamedTuple):
    """A rule's parameters and the state it continues from; in a loop, the state."""

    rule: PyTree
    state: PyTree  # as a parameter float32, shaped by the learned theta_0


def _continuing(rule: UpdateRule) -> UpdateRule:
    """The same rule, which starts from the state among its parameters."""

    def init(key: Array, params: PyTree) -> _Continued:
        own = rule.init(key, params)
        state = rule.bind(own).init(params)
        return _Continued(
            own, jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), state)
        )

    def bind(continued: _Continued) -> optax.GradientTransformationExtraArgs:
        tx = rule.bind(continued.rule)

        def init_fn(params: PyTree) -> _Continued:
            # a head whose classes share their start shares the state, too
            repeated = lambda s, fresh: jnp.broadcast_to(s, fresh.shape)  # noqa: E731
            fresh = tx.init(params)
            state = jax.tree.map(repeated, continued.state, fresh)
            return _Continued(
                (), jax.tree.map(lambda s, f: s.astype(f.dtype), state, fresh)
            )

        def update_fn(updates, state: _Continued, params=None, **extra):
            updates, inner = tx.update(updates, state.state, params, **extra)
            return updates, _Continued((), inner)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return UpdateRule(init, bind, rule.traits._replace(coordinatewise=False))


def _after(rule_params: PyTree, rule_state: PyTree) -> PyTree:
    """The rule's parameters with the state where a task has left it."""
    at_end = _part(rule_state, _Continued).state

    def mean_of_classes(old: Array, new: Array) -> Array:
        axes = [k for k in range(new.ndim) if old.shape[k] != new.shape[k]]
        return new.astype(old.dtype).mean(axes, keepdims=True)

    def moved_on(part: PyTree) -> PyTree:
        if not isinstance(part, _Continued):
            return part
        return part._replace(state=jax.tree.map(mean_of_classes, part.state, at_end))

    is_part = lambda part: isinstance(part, _Continued)  # noqa: E731
    return jax.tree.map(moved_on, rule_params, is_leaf=is_part)


def _part(tree: PyTree, kind: type) -> Any:
    """The one part of that kind; it may lie inside a chain's state."""
    parts = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, kind))
    return next(part for part in parts if isinstance(part, kind))
