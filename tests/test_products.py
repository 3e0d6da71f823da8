"""How precise matrix products are, by what `jax.default_matmul_precision` asks."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from experiments.common import devices
from metalstm import nn, rules
from metalstm.algorithms.metric import distances, feature_heads
from metalstm.runtime.compilation import traced_for
from metalstm.runtime.products import layer_product

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 8), (8, 5)))
product = functools.partial(layer_product, jnp.matmul)


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def test_inputs_and_output_of_a_product_are_rounded_where_that_is_asked_for():
    np.testing.assert_array_equal(product(A, B), A @ B)
    with jax.default_matmul_precision("bfloat16"):
        found = product(A, B)
        wide = product(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    assert (found.dtype, wide.dtype) == (jnp.float32, jnp.bfloat16)
    exact = rounded(A) @ rounded(B)
    np.testing.assert_array_equal(found, rounded(np.asarray(exact, np.float32)))
    assert not np.array_equal(found, A @ B)


def test_derivatives_round_alike_on_a_cpu_and_on_an_accelerator():
    loss = lambda a, b: jnp.tanh(product(a, b)).sum()  # noqa: E731
    gradient = jax.grad(loss, (0, 1))
    along = lambda a, b: jax.jvp(gradient, (a, b), (a, b))[1]  # noqa: E731
    backward = jax.grad(lambda a, b: sum(g.sum() for g in gradient(a, b)))
    for fn in (gradient, along, backward):
        with jax.default_matmul_precision("bfloat16"):
            here = fn(A, B)
            with traced_for("gpu"):
                there = fn(A, B)
        full = fn(A, B)
        for x, y, z in zip(*map(jax.tree.leaves, (here, there, full)), strict=True):
            assert x.dtype == y.dtype == jnp.float32
            np.testing.assert_allclose(x, y, rtol=2**-7, atol=2**-7)
            assert 0 < np.abs(x - z).max() < 0.1 * np.abs(z).max()


def test_a_learner_s_layers_round_and_its_scores_do_not():
    images = jnp.asarray(RNG.uniform(size=(5, 16, 16, 1)), jnp.float32)
    for learner in (nn.conv4(3, 4, num_blocks=2), nn.mlp(3, (8,))):
        state = learner.init(jax.random.key(0), images)
        apply = lambda x, s=state, m=learner: m.apply(s, x, norm="batch")  # noqa: E731
        outputs, after = apply(images)
        with jax.default_matmul_precision("bfloat16"):
            coarse, coarse_after = apply(images)
        assert {leaf.dtype for leaf in jax.tree.leaves(coarse_after)} == {
            jnp.dtype("float32")
        }
        jax.tree.map(
            lambda a, b: np.testing.assert_equal(a.shape, b.shape), after, state
        )
        difference = np.abs(coarse - outputs).max()
        assert 0 < difference < 0.05 * np.abs(outputs).max()
        assert not np.array_equal(coarse, rounded(coarse))


def products_of(fn, *args) -> list[str]:
    """The products of ``fn`` as a TPU is given them."""
    with traced_for("tpu"):
        text = export.export(jax.jit(fn), platforms=["tpu"])(*args).mlir_module()
    return re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)


@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_what_is_sensitive_to_rounding_is_in_float32_on_an_accelerator(asked):
    params = {"w": jnp.ones((7, 6)), "b": jnp.ones(40)}

    def update(rule):
        def loss(rule_params):
            tx = rule.bind(rule_params)
            state = tx.init(params)
            delta, state = tx.update(params, state, params, value=jnp.float32(1))
            delta, _ = tx.update(delta, state, params, value=jnp.float32(1))
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(delta))

        return jax.grad(loss), rule.init(jax.random.key(0), params)

    labels = jnp.arange(6) % 3
    sensitive = [
        update(rules.lstm_gates()),
        update(rules.l2l()),
        update(rules.gradient_memory()),
        (distances.squared_distances, A, B.T),
        (functools.partial(distances.similarities, distance="cosine"), A, B.T),
        (functools.partial(distances.class_means, way=3), A, labels),
        (functools.partial(feature_heads.ridge_scores, way=3), A, labels, B.T),
        (functools.partial(feature_heads.logistic_scores, way=3), A, labels, B.T),
    ]
    with jax.default_matmul_precision(asked):
        for fn, *args in sensitive:
            found = products_of(fn, *args)
            assert found
            for line in found:
                assert "precision = [HIGHEST, HIGHEST]" in line
                assert "bf16" not in line
        learner = nn.conv4(3, 4, num_blocks=2)
        images = jnp.ones((2, 16, 16, 1))
        state = learner.init(jax.random.key(0), images)
        *layers, head = products_of(
            lambda x: learner.apply(state, x, norm="batch")[0], images
        )
    assert "HIGHEST" in head
    for line in layers:
        assert ("bf16" in line) == (asked == "bfloat16")


def test_the_flag_asks_for_it_and_the_heading_says_so():
    before = jax.config.jax_default_matmul_precision
    try:
        devices.join(devices.Devices(matmul_precision="bfloat16"))
        assert jax.config.jax_default_matmul_precision == "bfloat16"
        assert devices.describe(None).endswith("device, products in bfloat16")
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert "products" not in devices.describe(None)
