"""The default start of the Meta-LSTM: a step that fits the data, at any scale of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import algorithms, first_order
from metalstm.algorithms.gradient.adaptation import step_scale
from metalstm.base import Batch, Learner, LearnerState
from metalstm.nn import mlp, tied_head

EPISODE = tiny.episode()
WAY = tiny.WAY
LINEAR = mlp(WAY, widths=())


def _softmax_regression(x, y, kernel):
    """Loss and gradient in float64; the bias starts at zero."""
    scores = x @ kernel
    scores -= scores.max(-1, keepdims=True)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    loss = -np.log(shares[np.arange(len(y)), y]).mean()
    error = (shares - np.eye(WAY)[y]) / len(y)
    return loss, x.T @ error, error.sum(0)


def test_the_scale_is_that_of_the_loss_and_gradient_in_float64():
    state = LINEAR.init(jax.random.key(0), EPISODE.support.x)
    x, y = (np.asarray(part) for part in EPISODE.support)
    kernel = np.asarray(state.params["head"]["kernel"], np.float64)
    scales = []
    with_bias = np.concatenate([x.astype(np.float64), np.ones((len(x), 1))], 1)
    weights = np.concatenate([kernel, np.zeros((1, WAY))])
    for _ in range(2):
        loss, gradient, _ = _softmax_regression(with_bias, y, weights)
        scales.append(4 * loss / np.square(gradient).sum())
        weights = weights - scales[0] / 2 * gradient
    found = step_scale(LINEAR, state, EPISODE.support, None)
    np.testing.assert_allclose(found, np.sqrt(np.prod(scales)), rtol=1e-5)


@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e4])
def test_on_a_quadratic_steps_below_it_converge_and_steps_above_diverge(curvature):
    quadratic = Learner(
        lambda key, x: LearnerState({"w": jnp.float32(1)}, (), ()),
        lambda s, x, norm, key=None: (
            jnp.sqrt(curvature) * s.params["w"] * jnp.ones((len(x), 1)),
            s,
        ),
    )
    task = Batch(jnp.zeros((3, 1)), jnp.zeros((3, 1)))
    state = quadratic.init(jax.random.key(0), task.x)
    scale = step_scale(quadratic, state, task, None)
    factor = lambda share: abs(1 - share * scale * 2 * curvature)  # noqa: E731
    assert factor(0.99) < 1 < factor(1.01)


def test_it_falls_with_the_square_of_the_features_and_not_with_copies_of_them():
    state = LINEAR.init(jax.random.key(0), EPISODE.support.x)
    start = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    x, y = EPISODE.support
    scale = step_scale(LINEAR, start, EPISODE.support, None)
    long, longer = (
        step_scale(LINEAR, start, Batch(length * x, y), None) for length in (1e2, 1e3)
    )
    np.testing.assert_allclose(longer, long / 100, rtol=1e-3)  # biases count no more
    twice = Batch(jnp.concatenate([x, x]), jnp.concatenate([y, y]))
    np.testing.assert_allclose(step_scale(LINEAR, start, twice, None), scale, rtol=1e-5)


def test_without_a_gradient_it_is_one():
    blind = Learner(LINEAR.init, lambda s, x, norm, key=None: (jnp.zeros((6, 3)), s))
    state = blind.init(jax.random.key(0), EPISODE.support.x)
    assert step_scale(blind, state, EPISODE.support, None) == 1


def test_the_gradient_is_multiplied_by_it():
    still = algorithms.learned_init(
        LINEAR,
        optax.sgd(0.5),
        num_steps=1,
        differentiation=first_order(),
        gradient_scale="calibrated",
    )
    params = still.init(jax.random.key(0), EPISODE)
    log_scale, _ = params.rule
    scale = step_scale(LINEAR, params.learner, EPISODE.support, None)
    np.testing.assert_allclose(jnp.exp(log_scale), scale, rtol=1e-6)
    inner, _ = still.adapt(params, jax.random.key(1), EPISODE.support)
    _loss, gradient, _ = _softmax_regression(
        np.asarray(EPISODE.support.x, np.float64),
        np.asarray(EPISODE.support.y),
        np.asarray(params.learner.params["head"]["kernel"], np.float64),
    )
    moved = inner.params["head"]["kernel"] - params.learner.params["head"]["kernel"]
    np.testing.assert_allclose(moved, -float(scale) / 2 * gradient, rtol=2e-4)


def test_a_head_of_any_way_is_calibrated_too():
    tied = tied_head(mlp(None, widths=(4,)))
    algorithm = algorithms.meta_lstm(tied, num_steps=2, train_way=WAY)
    params = algorithm.init(jax.random.key(0), EPISODE)
    assert jnp.isfinite(params.rule[0])
    assert jax.eval_shape(algorithm.init, jax.random.key(0), EPISODE)  # traces
