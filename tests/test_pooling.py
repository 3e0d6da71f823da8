"""The 2x2 max-pool against flax's, values and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metalstm.nn.pooling import max_pool


def flax_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def loss(pool, x):
    return jnp.sum(jnp.sin(pool(x) * x.mean()))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2)])
def test_values_and_derivatives_are_those_of_a_windowed_maximum(shape):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=shape)
        for fn in (
            lambda pool: pool(x),
            lambda pool: jax.jit(jax.grad(lambda x: loss(pool, x)))(x),
            lambda pool: jax.vmap(lambda a: pool(a * x))(jnp.arange(3.0)),
        ):
            np.testing.assert_allclose(fn(max_pool), fn(flax_pool), rtol=1e-12)


def test_second_derivatives_match_finite_differences():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(1, 4, 4, 1))
        v = np.random.default_rng(1).normal(size=x.shape)
        gradient = jax.jit(jax.grad(lambda x: loss(max_pool, x)))
        step = 1e-6
        expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
        forward = jax.jvp(gradient, (x,), (v,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)
        np.testing.assert_allclose(forward, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(reverse, expected, rtol=1e-6, atol=1e-9)


def test_the_first_of_equal_maxima_takes_the_gradient():
    x = jnp.array([[1.0, 2.0], [2.0, 2.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient.reshape(2, 2), [[0, 1], [0, 0]])
