"""What normalises a query: the table of docs/batch_norm.md, changed part by part."""

from __future__ import annotations

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from tiny import episode, norm_net, quick_jit

from metalstm import algorithms, first_order, rules
from metalstm.base import QueryNorm

NORMS, STATS = get_args(QueryNorm), ("final", "moving")
CASES = list(itertools.product(NORMS, ("frozen", "transductive"), STATS))


@pytest.mark.parametrize(("query_norm", "train_query_norm", "support_stats"), CASES)
def test_only_what_the_table_says_moves_a_prediction(
    query_norm, train_query_norm, support_stats
):
    algorithm = algorithms.learned_init(
        norm_net(),
        rules.learned_sgd(0.1),
        num_steps=1,
        differentiation=first_order(),
        query_norm=query_norm,
        train_query_norm=train_query_norm,
        support_stats=support_stats,
    )
    support, query = episode()
    params = algorithm.init(jax.random.key(0), episode())

    @quick_jit
    def first_query(shift, x):
        learner = params.learner
        stats = jax.tree.map(lambda leaf: leaf + shift, learner.stats)
        changed = params._replace(learner=learner._replace(stats=stats))
        key = jax.random.key(0)
        return algorithm.predict(changed, key, support, x, num_classes=3)[0]

    usual = first_query(0.0, query.x)
    averages = jnp.abs(first_query(5.0, query.x) - usual).max() > 1e-6
    others = jnp.abs(first_query(0.0, query.x.at[1:].add(3.0)) - usual).max() > 1e-6
    assert bool(averages) == (query_norm == "frozen")
    assert bool(others) == (query_norm == "transductive")


def test_meta_parameters_in_float64_normalise_by_moving_averages():
    """flax draws the averages that an episode starts from in float32."""
    algorithm = algorithms.learned_init(
        norm_net(),
        rules.learned_sgd(0.1),
        num_steps=1,
        differentiation=first_order(),
        support_stats="moving",
    )
    with jax.enable_x64(True):
        double = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, float))
        params = double(algorithm.init(jax.random.key(0), episode()))
        support, query = episode()
        support = support._replace(x=double(support.x))
        scores = algorithm.predict(
            params, jax.random.key(0), support, double(query.x), num_classes=3
        )
        assert scores.dtype == jnp.float64
