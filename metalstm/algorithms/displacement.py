"""Meta-train by where the inner loop ends, not by a query loss: Reptile."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from metalstm.algorithms.common import accuracy
from metalstm.algorithms.gradient_based import learned_init
from metalstm.base import (
    Array,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    PyTree,
    UpdateRule,
    make_algorithm,
    map_tasks,
)
from metalstm.rules import from_optax

__all__ = ["reptile"]

_TEST_STEPS = 50


def reptile(
    learner: Learner,
    rule: UpdateRule | float = 1e-3,
    *,
    num_steps: int = 5,
    num_test_steps: int | None = None,
    batch_size: int | None = None,
    test_batch_size: int | None = None,
    train_shots: int | None = None,
    **options: Any,
) -> MetaAlgorithm:
    """Reptile (Nichol et al., 2018): move theta_0 towards where tasks end.

    The meta-gradient is the mean over tasks of theta_0 - theta_T (algorithm 2), so that
    SGD with the rate epsilon takes the paper's step, theta_0 + epsilon (mean theta_T -
    theta_0). One task in a meta-step is the serial version (algorithm 1), several the
    batched one. Any outer optimizer will do; published: epsilon from 1 to 0.

    Args:
      learner: as in `learned_init`. A head whose classes share their start moves by
        their mean.
      rule: the inner rule; a number is Adam's rate with beta1 = 0. Its state starts
        afresh with each task, where the authors' code lets Adam's go on. A rule's own
        parameters are not learned.
      num_steps, num_test_steps: T in meta-training and at meta-test. None: 50, as
        published.
      batch_size, test_batch_size: images in one update. Published: 10, of which an
        epoch has several. None: the whole support set.
      train_shots: images of each class in meta-training, when they differ from the
        test's. Published: 10 (Omniglot) or 15 (mini-ImageNet). The query set has one.
      options: the further ones of `learned_init`.

    Raises:
      ValueError: ``query_norm="frozen"``, since averages are not gathered here.
    """
    if "frozen" in (options.get("query_norm"), options.get("train_query_norm")):
        raise ValueError(
            "reptile gathers no averages over meta-training for query_norm='frozen': "
            "choose support, support+1 or transductive"
        )
    if not isinstance(rule, UpdateRule):
        rule = from_optax(optax.adam(rule, b1=0.0))
    train_way: Any = options.get("train_way")
    fixed = {"second_order": False, **options}
    inner = learned_init(
        learner, rule, num_steps=num_steps, batch_size=batch_size, **fixed
    )
    at_way, adapt = learner.at_way, cast(Any, inner.adapt)
    tested = learned_init(
        learner,
        rule,
        num_steps=_TEST_STEPS if num_test_steps is None else num_test_steps,
        batch_size=test_batch_size,
        **fixed,
    )

    def displacement(start: PyTree, end: PyTree) -> PyTree:
        if at_way is None:
            return jax.tree.map(jnp.subtract, start, end)
        repeated, pull = jax.vjp(lambda p: at_way(p, train_way), start)
        (total,) = pull(jax.tree.map(jnp.subtract, repeated, end))
        (copies,) = pull(jax.tree.map(jnp.ones_like, repeated))
        return jax.tree.map(jnp.divide, total, copies)

    def one_task(meta_params: MetaParams, key: Array, episode: Episode):
        support, query = episode
        end, trace = adapt(meta_params, key, support, num_classes=train_way)
        state = meta_params.learner
        adapted = LearnerState(end.params, end.stats, state.other)
        outputs, _ = learner.apply(adapted, query.x, norm="batch")
        metrics = {
            "loss": trace.losses.mean(),
            "support_loss": trace.losses[0],
            "accuracy": accuracy(outputs, query.y),
        }
        return displacement(state.params, end.params), metrics

    def meta_gradient(meta_params: MetaParams, carry, keys: Array, episodes: Episode):
        moves, metrics = map_tasks(
            lambda key, episode: one_task(meta_params, key, episode),
            keys,
            episodes,
            how=options.get("task_mapping"),
        )
        moves, metrics = jax.tree.map(lambda leaf: leaf.mean(0), (moves, metrics))
        zeros = jax.tree.map(jnp.zeros_like, meta_params)
        grads = zeros._replace(learner=zeros.learner._replace(params=moves))
        return grads, carry, metrics

    def train_sampler(spec):
        spec = dataclasses.replace(inner.train_sampler(spec), queries=1)
        if train_shots is None:
            return spec
        return dataclasses.replace(spec, shot=train_shots)

    return make_algorithm(
        init=tested.init,
        predict=tested.predict,
        adapt=tested.adapt,
        meta_gradient=meta_gradient,
        train_sampler=train_sampler,
        query_norm=tested.query_norm,
    )
