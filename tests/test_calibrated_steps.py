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
from metalstm.base import Batch, Episode, Learner, LearnerState
from metalstm.batches import MaskedBatch
from metalstm.nn import mlp, tied_head

EPISODE = tiny.episode()
WAY = tiny.WAY
KEY = jax.random.key(0)
LINEAR = mlp(WAY, widths=())


def _softmax_regression(x, y, kernel):
    """Loss and gradient in float64; the bias starts at zero."""
    scores = x @ kernel
    scores -= scores.max(-1, keepdims=True)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    loss = -np.log(shares[np.arange(len(y)), y]).mean()
    error = (shares - np.eye(WAY)[y]) / len(y)
    return loss, x.T @ error, error.sum(0)


def _with_ones(x):
    return np.concatenate([np.asarray(x, np.float64), np.ones((len(x), 1))], 1)


def _after(kernel, scale, num_steps):
    """Query loss, support loss and gradient after gradient descent, in float64."""
    (x, y), (query_x, query_y) = EPISODE
    weights = np.concatenate([kernel, np.zeros((1, WAY))])
    for _ in range(num_steps):
        weights = weights - scale * _softmax_regression(_with_ones(x), y, weights)[1]
    judged = _softmax_regression(_with_ones(query_x), query_y, weights)[0]
    return judged, *_softmax_regression(_with_ones(x), y, weights)[:2]


def _judged_by_itself(batch):
    return Episode(batch, batch)


def _draws(learner):
    return [learner.init(k, EPISODE.support.x) for k in jax.random.split(KEY, 4)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_steps", [1, 3])
def test_it_is_the_geometric_mean_of_the_best_steps_of_the_grid(num_steps):
    """Against numpy in float64; steps that are too large overflow."""
    bests = []
    for state in _draws(LINEAR):
        kernel = np.asarray(state.params["head"]["kernel"], np.float64)
        after = lambda s, k=kernel: _after(k, s, num_steps)[0]  # noqa: E731
        before, loss, gradient = _after(kernel, 0.0, 0)
        unit = 4 * loss / (np.square(gradient).sum())
        coarse = min((unit * 4.0**k for k in range(-6, 5)), key=after)
        bests.append(min((coarse, coarse / 2, 2 * coarse), key=after))
        assert after(bests[-1]) < before
    assert len(set(np.round(bests, 3))) > 1
    found = step_scale(LINEAR, KEY, EPISODE, None, num_steps)
    np.testing.assert_allclose(found, np.exp(np.log(bests).mean()), rtol=1e-5)


def _quadratic(curvature, start=lambda key: jnp.float32(1)):
    return Learner(
        lambda key, x: LearnerState({"w": start(key)}, (), ()),
        lambda s, x, norm, key=None: (
            jnp.sqrt(curvature) * s.params["w"] * jnp.ones((len(x), 1)),
            s,
        ),
    )


@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e4])
def test_on_a_quadratic_it_is_newtons_step(curvature):
    task = _judged_by_itself(Batch(jnp.zeros((3, 1)), jnp.zeros((3, 1))))
    scale = step_scale(_quadratic(curvature), KEY, task, None, 2)
    np.testing.assert_allclose(scale * 2 * curvature, 1, rtol=1e-5)


def test_a_draw_that_no_step_improves_counts_for_nothing():
    starts = lambda key: jax.random.bernoulli(key).astype(jnp.float32)  # noqa: E731
    assert {float(starts(key)) for key in jax.random.split(KEY, 4)} == {0.0, 1.0}
    task = _judged_by_itself(Batch(jnp.zeros((3, 1)), jnp.zeros((3, 1))))
    scale = step_scale(_quadratic(8.0, starts), KEY, task, None, 2)
    np.testing.assert_allclose(scale, 1 / 16, rtol=1e-5)


def test_it_falls_with_the_square_of_the_features_and_not_with_copies_of_them():
    at_zero = LINEAR._replace(
        init=lambda key, x: jax.tree.map(jnp.zeros_like, LINEAR.init(key, x))
    )
    x, y = EPISODE.support
    step = lambda batch: step_scale(  # noqa: E731
        at_zero, KEY, _judged_by_itself(batch), None, 3
    )
    scale = step(EPISODE.support)
    long, longer = (step(Batch(length * x, y)) for length in (1e2, 1e3))
    np.testing.assert_allclose(longer, long / 100, rtol=1e-3)  # biases count no more
    twice = Batch(jnp.concatenate([x, x]), jnp.concatenate([y, y]))
    np.testing.assert_allclose(step(twice), scale, rtol=1e-5)


def test_rows_that_stand_for_no_example_change_nothing():
    x, y = EPISODE.support
    rows = jnp.concatenate([x, 100 + x[:2]]), jnp.concatenate([y, y[:2]])
    padded = MaskedBatch(*rows, jnp.arange(len(y) + 2) < len(y))
    padded = EPISODE._replace(support=padded)
    np.testing.assert_allclose(
        step_scale(LINEAR, KEY, padded, None, 3),
        step_scale(LINEAR, KEY, EPISODE, None, 3),
        rtol=1e-5,
    )


def test_without_a_gradient_it_is_one():
    blind = Learner(
        LINEAR.init, lambda s, x, norm, key=None: (jnp.zeros((len(x), 3)), s)
    )
    assert step_scale(blind, KEY, EPISODE, None, 3) == 1


def test_the_gradient_is_multiplied_by_it():
    still = algorithms.learned_init(
        LINEAR,
        optax.sgd(0.5),
        num_steps=1,
        differentiation=first_order(),
        gradient_scale="calibrated",
    )
    params = still.init(KEY, EPISODE)
    log_scale, _ = params.rule
    scale = step_scale(LINEAR, jax.random.split(KEY)[0], EPISODE, None, 1)
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
