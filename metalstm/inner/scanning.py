"""A `lax.scan` over the steps of an inner loop, and what its derivative is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metalstm.base import Array, PyTree

__all__ = ["KEPT", "Memory", "cut", "scan", "segment_length", "with_gradient"]

Memory = Literal["plain", "remat", "mixed", "segments"]
"""What `unroll` keeps of its steps for the way back; see docs/memory.md.

``plain``: all that they computed. ``remat``: theta_t and the rule's state; each step is
computed again. ``mixed``: these and the gradients; of a step only the rule is computed
again, and the derivative of its gradient is taken forward over reverse
(`mixed_mode.py`), which stores nothing of the learner. ``segments``: the state at
the start of every segment of about sqrt(T) steps; each segment is computed again, as
``mixed``.
"""

KEPT = "inner gradient"  # the name of what "mixed" keeps beside the states


def scan(step: Callable, start: PyTree, xs: PyTree, memory: Memory, unroll: int = 1):
    """`lax.scan`, which keeps for the way back what ``memory`` says."""
    length = jax.tree.leaves(xs)[0].shape[0]
    if memory == "plain":
        return lax.scan(step, start, xs, unroll=unroll)
    policies = jax.checkpoint_policies
    keep = None if memory == "remat" else policies.save_only_these_names(KEPT)
    # a loop computes again by itself; of straight-line code XLA would merge both times
    step = jax.checkpoint(step, prevent_cse=unroll > 1, policy=keep)
    steps = functools.partial(lax.scan, step, unroll=unroll)
    if memory != "segments":
        return steps(start, xs)

    segment = segment_length(length)
    whole = length - length % segment
    if whole == length:
        first, rest = xs, None
    else:  # a part of an array is a copy of it
        first = jax.tree.map(lambda x: x[:whole], xs)
        rest = jax.tree.map(lambda x: x[whole:], xs)
    first = jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), first)
    state, out = lax.scan(jax.checkpoint(steps, prevent_cse=False), start, first)
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
    if rest is not None:
        state, last = steps(state, rest)
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, last)
    return state, out


def segment_length(num_steps: int) -> int:
    """About sqrt(T), if possible a divisor: T / k + k states are then the fewest."""
    root = math.isqrt(num_steps - 1) + 1
    return next((k for k in range(root, 2 * root) if num_steps % k == 0), root)


def cut(state: PyTree, here: Array) -> PyTree:
    """``state``, a constant to the derivative where ``here`` is true."""
    return jax.tree.map(lambda x: jnp.where(here, lax.stop_gradient(x), x), state)


def with_gradient(values: PyTree, of: PyTree) -> PyTree:
    """``values``, with the derivatives of ``of``, whose value nobody then computes.

    Leaves that are not inexact have none. It is a primitive of its own because
    `lax.scan` forgets a `jax.custom_jvp` when it is differentiated a second time.
    """

    def one(value: Array, source: Array) -> Array:
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        return _with_gradient_p.bind(value, source.astype(value.dtype))

    return jax.tree.map(one, values, of)


_with_gradient_p = Primitive("with_gradient")
_with_gradient_p.def_impl(lambda value, of: value)
_with_gradient_p.def_abstract_eval(lambda value, of: value)
mlir.register_lowering(_with_gradient_p, lambda ctx, value, of: [value])
batching.defbroadcasting(_with_gradient_p)


def _with_gradient_jvp(primals, tangents):
    return _with_gradient_p.bind(*primals), tangents[1]


ad.primitive_jvps[_with_gradient_p] = _with_gradient_jvp
