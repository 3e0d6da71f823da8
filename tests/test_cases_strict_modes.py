"""JAX's strict modes: what works without them works with them, in float32."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_jit

from metalstm import (
    algorithms,
    data,
    learned_optimizers,
    nn,
    rules,
    second_order,
)
from metalstm.learned_optimizers import problems

MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": jax.disable_jit,
    "tracer leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
}
TRACED = {  # these refuse when traced: nothing needs to be compiled
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}
CONV, MLP = nn.conv4(3, 1, num_blocks=1), nn.mlp(None, (2,))
MAPS = nn.conv4(None, 1, num_blocks=1, feature_maps=True)
FOMAML = functools.partial(algorithms.fomaml, rate=0.1, num_steps=1)
GATES = rules.lstm_gates(hidden_size=1)
METHODS = {
    "fomaml": lambda: FOMAML(CONV, train_query_norm="frozen", query_norm="support+1"),
    "fine_tuning": lambda: algorithms.fine_tuning(MLP, 4, tune="all", num_steps=1),
    "gradient_agreement": lambda: algorithms.gradient_agreement(FOMAML(CONV)),
    "hallucination": lambda: algorithms.hallucination(MLP),
    "implicit_maml": lambda: algorithms.implicit_maml(CONV, 0.1, num_steps=1),
    "mann": lambda: algorithms.mann(MLP, way=3, hidden_size=1, num_slots=4),
    "margin_classifier": lambda: algorithms.margin_classifier(MLP, 4, loss="arcface"),
    "matching": lambda: algorithms.matching(MLP, context_steps=1),
    "meta_lstm": lambda: algorithms.published_meta_lstm(CONV, GATES, num_steps=1),
    "meta_lstm, calibrated": lambda: algorithms.meta_lstm(CONV, GATES, num_steps=1),
    "meta_sgd": lambda: algorithms.meta_sgd(CONV),
    "nearest_neighbour": algorithms.nearest_neighbour,
    "pretrained_features": lambda: algorithms.pretrained_features(MLP, 4),
    "pretrained_features with a prototypical loss": lambda: (
        algorithms.pretrained_features(MLP, 4, per_class=2, centroid_weight=1.0)
    ),
    "prototypical": lambda: algorithms.prototypical(MLP),
    "relation": lambda: algorithms.relation(
        MAPS, nn.relation_net(filters=1, hidden=1), train_way=3
    ),
    "resnet12": lambda: algorithms.prototypical(nn.resnet12(None, widths=(1,))),
    "siamese": lambda: algorithms.siamese(MLP),
    "two_layer": lambda: algorithms.learned_init(
        CONV, rules.two_layer(), num_steps=1, differentiation=second_order()
    ),
}
SPEC = data.EpisodeSpec(
    way=3, shot=1, queries=1, normalise=data.Normalisation((0.5,), (0.5,))
)
IMAGES = np.random.default_rng(0).integers(0, 255, (4, 2, 4, 4, 1), np.uint8)


def run(algorithm, pool):
    """Meta-parameters, their gradient, and the scores of one episode."""
    episode = SPEC.sample(data.episode_key(0, "train", 0), pool)
    key = data.episode_key(0, "train", 1)
    trained_on = algorithm.train_sampler(SPEC).sample(key, pool)
    params, grads = algorithm.init(jax.random.key(0), trained_on), ()
    if algorithm.trainable:
        tasks = jax.tree.map(lambda leaf: leaf[None], trained_on)
        carry = algorithm.init_carry(jax.random.key(1), params, trained_on)
        keys = jax.random.split(jax.random.key(1), 1)
        grads, _, _ = algorithm.meta_gradient(params, carry, keys, tasks)
    support, query = episode
    key = jax.random.key(2)
    scores = algorithm.predict(params, key, support, query.x, num_classes=3)
    return params, grads, scores


@pytest.mark.parametrize("name", ["meta_lstm", "prototypical"])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_float32_and_finite_under(mode, name):
    with warnings.catch_warnings(), MODES[mode]():
        warnings.simplefilter("error", FutureWarning)
        run_one = quick_jit(functools.partial(run, METHODS[name]()))
        leaves = jax.tree.leaves(run_one(data.make_pool(IMAGES)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_traced_under_strict_promotion(name):
    for mode in TRACED.values():
        with mode():
            pool = data.make_pool(IMAGES)
            jax.eval_shape(functools.partial(run, METHODS[name]()), pool)


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_every_rule_is_traced_under_strict_promotion(estimator):
    moments = rules.l2l(hidden_size=1, features="moments")
    for rule in (rules.l2l(hidden_size=1), moments, GATES, rules.two_layer()):
        algorithm = learned_optimizers.learned_optimizer(
            family := problems.quadratics(2),
            rule,
            num_tasks=2,
            unroll_steps=2,
            loss_transform="relative",
            stagger=True,
            estimator=estimator,
        )
        sampler = learned_optimizers.ProblemSampler(family, 3)

        def step(algorithm=algorithm, sampler=sampler):
            keys = jax.random.split(jax.random.key(0), 2)
            draws = jax.vmap(lambda key: sampler.sample(key, None))(keys)
            one = jax.tree.map(lambda leaf: leaf[0], draws)
            params = algorithm.init(keys[0], one)
            carry = algorithm.init_carry(keys[0], params, one)
            return algorithm.meta_gradient(params, carry, keys, draws)

        for mode in TRACED.values():
            with mode():
                jax.eval_shape(step)
