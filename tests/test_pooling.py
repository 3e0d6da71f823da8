"""The 2x2 max-pool against flax's, values and derivatives."""

from __future__ import annotations

import functools
import warnings
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from metalstm import algorithms, nn, second_order, unroll
from metalstm.base import Batch, Episode
from metalstm.inner.differentiation import Keep
from metalstm.nn.general_convolution import say_once
from metalstm.nn.pooling import max_pool, scaled_max_pool
from metalstm.runtime.compilation import traced_for

ONES = jnp.ones((1, 4, 4, 1))


def flax_pool(x):
    return linen.max_pool(x, (2, 2), (2, 2))


def loss(pool, x):
    return jnp.sum(jnp.sin(pool(x) * x.mean()))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2)])
def test_values_and_derivatives_are_those_of_a_windowed_maximum(shape, platform):
    with jax.enable_x64(True), traced_for(platform):
        x = np.random.default_rng(0).normal(size=shape)
        for fn in (
            lambda pool: pool(x),
            lambda pool: jax.jit(jax.grad(lambda x: loss(pool, x)))(x),
            lambda pool: jax.vmap(lambda a: pool(a * x))(jnp.arange(3.0)),
        ):
            np.testing.assert_allclose(fn(max_pool), fn(flax_pool), rtol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_second_derivatives_match_finite_differences(platform):
    with jax.enable_x64(True), traced_for(platform):
        x = np.random.default_rng(0).normal(size=(1, 4, 4, 1))
        v = np.random.default_rng(1).normal(size=x.shape)
        gradient = jax.jit(jax.grad(lambda x: loss(max_pool, x)))
        step = 1e-6
        expected = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
        forward = jax.jvp(gradient, (x,), (v,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)
        np.testing.assert_allclose(forward, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(reverse, expected, rtol=1e-6, atol=1e-9)
        together = jax.vmap(lambda v: jax.jvp(gradient, (x,), (v,))[1])(
            jnp.stack([v, 2 * v])
        )
        np.testing.assert_allclose(together[1], 2 * forward, rtol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_first_of_equal_maxima_takes_the_gradient(platform):
    x = jnp.array([[1.0, 2.0], [2.0, 2.0]]).reshape(1, 2, 2, 1)
    with traced_for(platform):
        gradient = jax.grad(lambda x: max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient.reshape(2, 2), [[0, 1], [0, 0]])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 7, 3)])
def test_what_scales_after_the_pool_is_a_pool_of_what_is_scaled(shape, platform):
    def reference(x, slope):
        return flax_pool(slope * x)

    pools, rng = (scaled_max_pool, reference), np.random.default_rng(0)
    with jax.enable_x64(True), traced_for(platform):
        x, v = rng.normal(size=(2, *shape))
        for slope_shape in ((3,), (2, 1, 1, 3)):
            slope = jnp.asarray(rng.normal(size=slope_shape))

            def value(pool, x, slope=slope):
                return jnp.sum(jnp.sin(pool(x, slope) * x.mean()))

            def curvature(pool, x, value=value):
                """Forward over reverse, for several tangents."""
                gradient = jax.grad(lambda x: value(pool, x))
                return jax.vmap(lambda t: jax.jvp(gradient, (x,), (t * v,))[1])(
                    jnp.arange(3.0)
                )

            def third(pool, x, curvature=curvature):
                return jax.grad(lambda x: (curvature(pool, x) ** 2).sum())(x)

            for fn in (value, curvature, third):
                ours, theirs = (jax.jit(functools.partial(fn, p))(x) for p in pools)
                np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
            ours, theirs = (
                jax.grad(lambda s, p=p, value=value: value(p, x, s))(slope)
                for p in pools
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-10)
        slopes = jnp.stack([slope, -slope])
        together = jax.vmap(
            lambda s: jax.grad(lambda x: value(scaled_max_pool, x, s))(x)
        )
        alone = jax.grad(lambda x: value(scaled_max_pool, x, -slope))(x)
        np.testing.assert_allclose(together(slopes)[1], alone, rtol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_at_ties_every_derivative_takes_the_same_maximum(platform):
    """Else the Hessian is not symmetric, and what is kept changes the gradient."""
    with jax.enable_x64(True), traced_for(platform):
        weights = jax.random.normal(jax.random.key(0), (4,))
        start = jnp.ones((1, 4, 4, 1))

        def fn(x):
            return (max_pool(x).ravel() * weights).sum() ** 3 / 3

        hessian = jax.hessian(fn)(start).reshape(16, 16)
        np.testing.assert_allclose(hessian, hessian.T, rtol=1e-12)

        def outer(x, keep):
            end, _ = unroll(
                lambda x, stats, batch, key: (fn(x), stats),
                optax.sgd(0.1),
                (),
                x,
                num_steps=2,
                differentiation=second_order(keep),
            )
            return fn(end.params)

        grads = [jax.grad(outer)(start, keep) for keep in get_args(Keep)]
        for grad in grads[1:]:
            np.testing.assert_allclose(grad, grads[0], rtol=1e-12)


def test_no_compiler_flag_makes_the_second_order_nan():
    """XLA may compute the maximum from copies that are rounded otherwise."""
    learner = nn.conv4(3, 4, norm="layer", num_blocks=2)
    maml = algorithms.maml(learner, 0.1, num_steps=2)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32)
    batch = Batch(x, jnp.arange(3))
    params = maml.init(jax.random.key(0), Episode(batch, batch))
    grads = jax.grad(
        lambda p: maml.loss(p, jax.random.key(1), Episode(batch, batch))[0]
    )
    program = (
        jax.jit(grads).lower(params).compile({"xla_backend_optimization_level": 0})
    )
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(program(params)))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 5, 6, 2), {"window_shape": (3, 3), "strides": (2, 2), "padding": "SAME"}),
        ((2, 5, 6, 2), {"window_shape": (2, 2)}),  # strides of 1, as in flax
        ((1, 5, 6, 2), {"window_shape": (2, 3), "padding": ((1, 1), (0, 2))}),
        ((2, 7, 2), {"window_shape": (3,), "strides": (2,)}),
        ((6, 6, 2), {"window_shape": (2, 2), "strides": (2, 2)}),  # one example
    ],
)
def test_any_window_is_flax_s_value_and_gradient(shape, options):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    for fn in (lambda p: p(x), lambda p: jax.grad(lambda x: jnp.sin(p(x)).sum())(x)):
        ours, theirs = (
            fn(lambda x, pool=pool: pool(x, **options))
            for pool in (max_pool, linen.max_pool)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    bad = x.at[0].set(jnp.nan)
    assert jnp.isnan(max_pool(bad, **options)).any()


@pytest.mark.parametrize(("layers", "has_window"), [("fastest", False), ("flax", True)])
@pytest.mark.parametrize("is_nnx", [False, True])
def test_a_user_s_max_pools_are_ours_unless_switched_off(layers, has_window, is_nnx):
    module = linen.Sequential([lambda x: linen.max_pool(x, (3, 2), (1, 2))])

    class Pools(nnx.Module):
        def __call__(self, x):
            return nnx.max_pool(x, (3, 2), (1, 2))

    learner = nn.from_flax(Pools if is_nnx else module, layers=layers)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 3)), jnp.float32)
    state = learner.init(jax.random.key(0), x)
    run = lambda x: learner.apply(state, x, norm="batch")[0]  # noqa: E731
    assert ("reduce_window" in str(jax.make_jaxpr(run)(x))) == has_window
    np.testing.assert_array_equal(run(x), linen.max_pool(x, (3, 2), (1, 2)))
    averages = nn.from_flax(linen.Sequential([lambda x: linen.avg_pool(x, (2, 2))]))
    state = averages.init(jax.random.key(0), x)
    found, _ = averages.apply(state, x, norm="batch")
    np.testing.assert_array_equal(found, linen.avg_pool(x, (2, 2)))


def test_the_mask_is_computed_once():
    """Else XLA's CPU backend compares the corners again in every use of it."""
    for platform in ("cpu", "gpu"):
        with traced_for(platform):
            program = str(jax.make_jaxpr(jax.grad(lambda x: max_pool(x).sum()))(ONES))
        assert ("optimization_barrier" in program) == (platform == "cpu")


@pytest.mark.skipif("jax.default_backend() != 'cpu'")
def test_a_pool_of_three_axes_says_once_that_it_stays_slow():
    say_once.cache_clear()
    x = jnp.ones((1, 4, 4, 4, 1))
    with pytest.warns(RuntimeWarning, match="max-pool of 3 image axes has no fast"):
        out = max_pool(x, (2, 2, 2), (2, 2, 2))
    assert out.shape == (1, 2, 2, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        max_pool(x, (2, 2, 2), (2, 2, 2))
