"""A `lax.scan` over the steps of an inner loop, and what its derivative is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metalstm.base import Array, PyTree
from metalstm.inner.differentiation import Keep

__all__ = [
    "INNER_GRADIENT",
    "concatenate",
    "scaled",
    "scan",
    "segment_length",
    "stop_gradient_where",
    "with_gradient",
]

INNER_GRADIENT = "inner gradient"  # the name of what "mixed" keeps next to the states


def scan(step: Callable, start: PyTree, xs: PyTree, keep: Keep, unroll: int = 1):
    """`lax.scan` whose backward pass stores what ``keep`` says."""
    if keep == "all":
        return lax.scan(step, start, xs, unroll=unroll)
    policies = jax.checkpoint_policies
    policy = None if keep == "remat" else policies.save_only_these_names(INNER_GRADIENT)
    # XLA cannot merge a loop's body with its recomputation; in straight-line code it
    # would, and so keep everything
    step = jax.checkpoint(step, prevent_cse=unroll > 1, policy=policy)
    steps = functools.partial(lax.scan, step, unroll=unroll)
    if keep != "segments":
        return steps(start, xs)

    length = jax.tree.leaves(xs)[0].shape[0]
    segment = segment_length(length)
    in_segments = length - length % segment
    if in_segments == length:
        segments, rest = xs, None
    else:  # slicing copies, so only where steps are left over
        segments = jax.tree.map(lambda x: x[:in_segments], xs)
        rest = jax.tree.map(lambda x: x[in_segments:], xs)
    segments = jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), segments)
    state, out = lax.scan(jax.checkpoint(steps, prevent_cse=False), start, segments)
    out = jax.tree.map(lambda x: x.reshape(in_segments, *x.shape[2:]), out)
    if rest is not None:
        state, last = steps(state, rest)
        out = concatenate(out, last)
    return state, out


def concatenate(*parts: PyTree) -> PyTree:
    """Join what several scans over consecutive steps gave out."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def scaled(grads: PyTree, scale: Array | float) -> PyTree:
    """Return the gradients as the rule is to see them."""
    if isinstance(scale, int | float) and scale == 1:
        return grads
    return jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)


def segment_length(num_steps: int) -> int:
    """Choose about sqrt(T), if possible a divisor: T / k + k states are then fewest.

    >>> [segment_length(num_steps) for num_steps in (1, 10, 100)]
    [1, 5, 10]
    """
    root = math.isqrt(num_steps - 1) + 1
    return next((k for k in range(root, 2 * root) if num_steps % k == 0), root)


def stop_gradient_where(is_constant: Array, tree: PyTree) -> PyTree:
    """Return ``tree``, a constant to the derivative where the bool scalar is true."""
    return jax.tree.map(lambda x: jnp.where(is_constant, lax.stop_gradient(x), x), tree)


def with_gradient(values: PyTree, source: PyTree) -> PyTree:
    """Return ``values`` with the derivatives of ``source``.

    The value of ``source`` is then needed by nobody, and is not computed. Leaves that
    are not inexact have no derivative. This is a primitive because `lax.scan` forgets a
    `jax.custom_jvp` when it is differentiated a second time.
    """

    def one(value: Array, source: Array) -> Array:
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        return _with_gradient_p.bind(value, source.astype(value.dtype))

    return jax.tree.map(one, values, source)


_with_gradient_p = Primitive("with_gradient")
_with_gradient_p.def_impl(lambda value, source: value)
_with_gradient_p.def_abstract_eval(lambda value, source: value)
mlir.register_lowering(_with_gradient_p, lambda ctx, value, source: [value])
batching.defbroadcasting(_with_gradient_p)


def _with_gradient_jvp(primals, tangents):
    return _with_gradient_p.bind(*primals), tangents[1]


ad.primitive_jvps[_with_gradient_p] = _with_gradient_jvp
