"""What the tests of the core share: the smallest learners, tasks and programs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metalstm.base import Batch, Episode, Learner, LearnerState
from metalstm.nn import from_flax

WAY, SHOT, FEATURES = 3, 2, 4

quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
"""`jax.jit` that compiles in two thirds of the time: compiling is what tests spend."""


def episode(seed: int = 0, *, way: int = WAY, queries: int = 2) -> Episode:
    """Gaussian clusters, one a class; support shuffled, so labels are in no order."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(way, FEATURES))

    def draw(num):
        y = rng.permutation(np.repeat(np.arange(way), num))
        x = centres[y] + 0.5 * rng.normal(size=(len(y), FEATURES))
        return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    return Episode(draw(SHOT), draw(queries))


def episodes(num: int, **options) -> Episode:
    """A meta-batch: leading [num]."""
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(episode(k, **options) for k in range(num))
    )


class NormNet(nn.Module):
    """Dense, batch norm, tanh, dense: smooth, with statistics."""

    num_classes: int = WAY

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        return nn.Dense(self.num_classes)(jnp.tanh(x))


def norm_net(num_classes: int = WAY) -> Learner:
    return from_flax(NormNet(num_classes))


def tanh_net(hidden: int = 5, num_classes: int = WAY, features: int = FEATURES):
    """Neither flax nor statistics; `reference.TanhNet` is its transcription."""

    def init(key, x):
        del x
        keys = jax.random.split(key)
        params = {
            "b1": jnp.zeros(hidden),
            "b2": jnp.zeros(num_classes),
            "w1": 0.5 * jax.random.normal(keys[0], (features, hidden)),
            "w2": 0.5 * jax.random.normal(keys[1], (hidden, num_classes)),
        }
        return LearnerState(params, {}, {})

    def apply(state, x, *, norm, key=None):
        del norm, key
        p = state.params
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], state

    return Learner(init, apply)


def max_difference(a, b) -> float:
    """The largest absolute difference between two pytrees of one structure."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        (float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs),
        default=0.0,
    )


def assert_close(a, b, **tolerance) -> None:
    """`np.testing.assert_allclose`, leaf by leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_equal(a, b) -> None:
    """The same structure and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


RULE_MODULE = """
import jax.numpy as jnp
import metalstm
import optax

def tanh_descent(rate=0.1) -> metalstm.UpdateRule:
    def bind(p):
        step = lambda grad, param: -p["alpha"] * jnp.tanh(p["beta"] * grad)
        return optax.with_extra_args_support(optax.stateless_with_tree_map(step))
    init = lambda key, params: {"alpha": jnp.float32(rate), "beta": jnp.float32(1)}
    traits = metalstm.RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    return metalstm.UpdateRule(init, bind, traits)
"""
"""The text of a user's module with a rule."""
