"""A user's convolutions are computed in our form, with flax's values."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from tiny import assert_close, quick_jit

from metalstm.nn import from_flax
from metalstm.nn.general_convolution import conv_general_dilated

KINDS = {  # keywords of a layer; x is [2, 7, 6, 4] or [2, 7, 4]
    "1-D": {"kernel_size": (3,)},
    "1-D causal": {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
    "1-D strides": {"kernel_size": (4,), "strides": 2, "padding": "VALID"},
    "1x1": {"kernel_size": (1, 1)},
    "circular": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    "depthwise": {"kernel_size": (3, 3), "feature_group_count": 4},
    "depthwise, twice": {"kernel_size": (3, 3), "feature_group_count": 4, "out": 8},
    "dilated": {"kernel_size": (3, 2), "kernel_dilation": (2, 1)},
    "even": {"kernel_size": (2, 2)},
    "groups": {"kernel_size": (3, 3), "feature_group_count": 2, "strides": (2, 1)},
    "pads": {"kernel_size": (3, 3), "padding": ((2, 0), (1, 1))},
    "same": {"kernel_size": (3, 3)},
    "strides": {"kernel_size": (5, 3), "strides": (2, 3)},
    "valid": {"kernel_size": (3, 3), "padding": "VALID"},
}


def inputs(options) -> jax.Array:
    sizes = (7, 6)[: len(options["kernel_size"])]
    return jnp.asarray(
        np.random.default_rng(0).normal(size=(2, *sizes, 4)), jnp.float32
    )


def make(kind: str, *, linen: bool, out: int = 4, **options):
    if linen:
        return nn.Conv(out, **options)
    return functools.partial(nnx.Conv, 4, out, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_derivatives_are_those_of_flax(kind):
    options, linen = KINDS[kind], list(KINDS).index(kind) % 2 == 0
    module, x = make(kind, linen=linen, **options), inputs(options)
    ours, theirs = (from_flax(module, layers=c) for c in ("fastest", "flax"))
    state = theirs.init(jax.random.key(0), x)
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(
        state
    )

    def results(learner):
        def loss(params, x):
            outputs, _ = learner.apply(state._replace(params=params), x, norm="batch")
            return jnp.sin(outputs).mean()

        grads = jax.grad(loss, (0, 1))
        again = jax.grad(
            lambda p: sum(jnp.square(g).sum() for g in jax.tree.leaves(grads(p, x)))
        )
        return quick_jit(lambda p: (loss(p, x), grads(p, x), again(p)))(state.params)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(ours)
    assert_close(found, results(theirs), rtol=1e-3, atol=1e-5)
    program = str(jax.make_jaxpr(lambda s: ours.apply(s, x, norm="batch")[0])(state))
    assert "conv_general_dilated" not in program
    program = str(jax.make_jaxpr(lambda s: theirs.apply(s, x, norm="batch")[0])(state))
    assert "conv_general_dilated" in program


def test_what_has_no_fast_form_is_said_once_and_is_flax_s():
    x = jnp.ones((1, 3, 3, 3, 2))
    learner = from_flax(nn.Conv(2, (2, 2, 2)))
    with pytest.warns(RuntimeWarning, match="3 image axes.* has no fast form on a CPU"):
        state = learner.init(jax.random.key(0), x)
    expected = nn.Conv(2, (2, 2, 2)).apply({"params": state.params}, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs, _ = learner.apply(state, x, norm="batch")
    np.testing.assert_array_equal(outputs, expected)


def test_a_layer_keeps_the_function_that_it_was_given():
    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return lax.conv_general_dilated(*args, **kwargs)

    x = jnp.ones((1, 4, 4, 1))
    for module in (
        nn.Conv(1, (3, 3), conv_general_dilated=mine),
        functools.partial(nnx.Conv, 1, 1, (3, 3), conv_general_dilated=mine),
    ):
        learner = from_flax(module)
        state = learner.init(jax.random.key(0), x)
        calls.clear()
        learner.apply(state, x, norm="batch")
        assert calls
    with pytest.raises(ValueError, match="layers='fast': choose one of fastest, f"):
        from_flax(nn.Conv(1, (3, 3)), layers="fast")


@pytest.mark.filterwarnings("ignore:a convolution of:RuntimeWarning")
def test_layouts_and_types_that_flax_has_not_are_lax_s():
    x, kernel = jnp.ones((1, 2, 5, 5)), jnp.ones((3, 2, 3, 3))
    out = conv_general_dilated(x, kernel, (1, 1), "SAME")  # channels first
    assert out.shape == (1, 3, 5, 5)
    x, kernel = jnp.ones((1, 5, 5, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 3))
    numbers = ("NHWC", "HWIO", "NHWC")
    out = conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=numbers)
    assert out.dtype == jnp.float32
