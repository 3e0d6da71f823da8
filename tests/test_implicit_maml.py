"""Implicit MAML: closed forms, and its gradient against float64 finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from test_algorithms import EPISODE, NET, TASK, W, meta_params, slope_learner
from test_gradient_methods import RATE, batch_of, meta_gradient, slope_params

from metalstm import algorithms
from metalstm.algorithms.gradient.proximal import proximal_pull
from metalstm.base import LearnerState, MetaParams


def test_implicit_maml_on_a_parabola_in_closed_form():
    """w* = (2 x y + s W) / (2 x^2 + s), so dw*/dW = s / (2 x^2 + s)."""
    (x, y), (u, v) = TASK
    strength = 3.0
    end = (2 * x * y + strength * W) / (2 * x**2 + strength)
    expected = 2 * u * (u * end - v) * strength / (2 * x**2 + strength)
    imaml = algorithms.implicit_maml(
        slope_learner(), RATE, strength=strength, num_steps=60
    )
    grads, _ = meta_gradient(imaml, slope_params(), batch_of(TASK.episode()))
    np.testing.assert_allclose(grads.learner.params, expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, "way", "1/batch"])
def test_implicit_maml_is_the_slope_of_the_fully_converged_inner_solution(scale):
    """Against central differences of numpy's float64 minimiser.

    A loss and a pull that are scaled alike have the same minimum.
    """
    net, strength = reference.TanhNet(tiny.FEATURES, 2, tiny.WAY), 1.5
    support, query = (
        net.objective(np.asarray(b.x, np.float64), np.asarray(b.y)) for b in EPISODE
    )

    def converged(theta):
        phi = theta
        for _ in range(100):
            phi = phi - 0.35 * (support(phi)[1] + strength * (phi - theta))
        return phi

    rng = np.random.default_rng(0)
    theta = 0.5 * rng.normal(size=net.size)
    slope = support(converged(theta))[1] + strength * (converged(theta) - theta)
    assert np.abs(slope).max() < 1e-10
    expected = reference.central_difference(
        lambda at: query(converged(at))[0], theta, 1e-3
    )
    params = jax.tree.map(jnp.float32, net.unpack(theta))
    factor = {1.0: 1.0, "way": tiny.WAY, "1/batch": 1 / len(EPISODE.support.y)}[scale]
    imaml = algorithms.implicit_maml(
        tiny.tanh_net(2),
        0.35 / factor,
        strength=factor * strength,
        num_steps=60,
        cg_steps=net.size,
        gradient_scale=scale,
    )
    start = MetaParams(LearnerState(params, {}, {}), ())
    grads, _ = meta_gradient(imaml, start, batch_of(EPISODE))
    found = np.concatenate(
        [np.ravel(leaf) for leaf in jax.tree.leaves(grads.learner.params)]
    )
    np.testing.assert_allclose(found, expected, atol=3e-5)
    plain = query(converged(theta))[1]  # first-order MAML's answer is another
    assert np.abs(plain - expected).max() > 1e-2


def test_implicit_maml_normalises_training_queries_as_asked():
    losses = []
    for norm in ("transductive", "support"):
        algorithm = algorithms.implicit_maml(NET, num_steps=1, train_query_norm=norm)
        _, metrics = meta_gradient(algorithm, meta_params("maml"), batch_of(EPISODE))
        losses.append(metrics["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_implicit_maml_refuses():
    with pytest.raises(ValueError, match=r"strength=0.0: choose a number above 0"):
        algorithms.implicit_maml(NET, strength=0.0)
    with pytest.raises(ValueError, match=r"cg_steps=0: choose 1 or more"):
        algorithms.implicit_maml(NET, cg_steps=0)
    with pytest.raises(ValueError, match=r"'frozen': choose one of transductive, sup"):
        algorithms.implicit_maml(NET, train_query_norm="frozen")
    pull = proximal_pull(1.0)
    with pytest.raises(ValueError, match=r"proximal_pull needs params"):
        pull.update(jnp.ones(2), pull.init(jnp.ones(2)))


def test_the_pull_towards_the_start_is_the_gradient_of_its_square():
    pull = proximal_pull(2.0)
    start, now = jnp.array([1.0, -1.0]), jnp.array([1.5, 0.0])
    out, _ = pull.update(jnp.array([0.1, 0.1]), pull.init(start), now)
    np.testing.assert_allclose(out, [1.1, 2.1], rtol=1e-6)
