"""The head that fits any number of classes, and gates that start apart on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen

from metalstm import algorithms, nn, rules

KEY = jax.random.key(0)


class Features(linen.Module):
    @linen.compact
    def __call__(self, x):
        return jnp.tanh(linen.Dense(4)(x))


class Images(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x


class Counting(linen.Module):
    @linen.compact
    def __call__(self, x):
        count = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        return linen.Dense(tiny.WAY)(x) + 0 * count.value


def test_classes_share_their_start_at_any_way():
    x = tiny.episode().support.x
    learner = nn.tied_head(nn.from_flax(Features()))
    state = learner.init(KEY, x)
    head = {"kernel": jnp.arange(4.0)[:, None], "bias": jnp.ones(1)}
    state = state._replace(params=state.params | {"head": head})
    body = nn.from_flax(Features())
    features, _ = body.apply(
        state._replace(params=state.params["body"]), x, norm="stored"
    )
    for way in (2, 7):
        at_way = state._replace(params=learner.at_way(state.params, way))
        outputs, after = learner.apply(at_way, x, norm="batch")
        expected = np.asarray(features) @ np.arange(4.0) + 1
        np.testing.assert_allclose(
            outputs, np.repeat(expected[:, None], way, 1), rtol=1e-5
        )
        tiny.assert_equal(after.params, at_way.params)


def test_the_first_update_moves_the_head_and_nothing_else():
    """Every class has the same weights: no image can prefer features for its class."""
    learner = nn.tied_head(nn.from_flax(Features()))
    algorithm = algorithms.maml(learner, 0.5, num_steps=1, train_way=tiny.WAY)
    episode = tiny.episode()
    params = algorithm.init(KEY, episode)
    inner, _ = algorithm.adapt(params, KEY, episode.support, num_classes=tiny.WAY)
    start = learner.at_way(params.learner.params, tiny.WAY)
    assert tiny.max_difference(inner.params["body"], start["body"]) < 1e-7
    assert tiny.max_difference(inner.params["head"], start["head"]) > 0.01


def test_a_body_without_features_is_refused():
    images = nn.from_flax(Images())
    with pytest.raises(ValueError, match=r"tied_head needs features \[N, d\]: flatten"):
        nn.tied_head(images).init(KEY, jnp.zeros((2, 3, 3)))


def test_integers_next_to_the_parameters_are_refused():
    algorithm = algorithms.maml(nn.from_flax(Counting()))
    with pytest.raises(
        ValueError, match=r"carries \['calls'\]\['count'\] of type int3"
    ):
        algorithm.init(KEY, tiny.episode())


def test_a_head_may_have_gates_that_start_apart():
    learner = nn.tied_head(nn.from_flax(Features()))
    params = learner.init(KEY, tiny.episode().support.x).params
    options = {
        "hidden_size": 0,
        "bias_per": "tensor_and_step",
        "num_bias_steps": 2,
        "input_bias": (-4.0, -4.0),
        "input_bias_of": {"head": (-1.0, -1.0)},
    }
    weights = rules.lstm_gates(**options).init(KEY, params)
    # the tree's order: body bias, body kernel, head bias, head kernel
    np.testing.assert_array_equal(
        weights["input"]["bias"], [[-4, -4, -1, -1], [-4, -4, -1, -1]]
    )
    assert weights["forget"]["bias"].min() >= 4
    with pytest.raises(ValueError, match=r"input_bias_of names 'tail', but the tens"):
        rules.lstm_gates(**(options | {"input_bias_of": {"tail": (0, 0)}})).init(
            KEY, params
        )
    with pytest.raises(ValueError, match=r"needs a bias for each tensor: choose"):
        rules.lstm_gates(input_bias_of={"head": (0, 0)})


def test_without_a_final_relu_features_keep_their_sign():
    x = jax.random.normal(KEY, (2, 8, 8, 1))
    for final_relu in (True, False):
        learner = nn.conv4(
            None, 2, num_blocks=1, downsample="stride", final_relu=final_relu
        )
        features, _ = learner.apply(learner.init(KEY, x), x, norm="batch")
        assert (features.min() >= 0) == final_relu
