"""Low-precision parameters, updated in full precision."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import PyTree
from metalstm.rules.flat import coordinate_dtype

__all__ = ["FloatCopyState", "with_float_copy"]


class FloatCopyState(NamedTuple):
    copy: PyTree  # the parameters in float32
    inner: PyTree  # the transform's own state


def with_float_copy(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keep a float32 copy of the parameters, so that small updates add up.

    In bfloat16 1 + 0.001 is 1. Here ``tx`` sees and moves the copy, and each update
    takes the parameters to the copy's nearest value. Put it outermost. Parameters that
    something else changes in between are set back to the copy.

    Raises:
      ValueError: the update is called without the parameters.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        # copies of float32 too: parameters and state may both be donated
        copy = jax.tree.map(lambda p: jnp.array(p, coordinate_dtype(p)), params)
        return FloatCopyState(copy, tx.init(copy))

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "with_float_copy needs the parameters: tx.update(grads, state, params)"
            )
        wide = jax.tree.map(lambda g: jnp.asarray(g, coordinate_dtype(g)), updates)
        moves, inner = tx.update(wide, state.inner, state.copy, **extra)
        copy = optax.apply_updates(state.copy, moves)
        # in float32, so that optax.apply_updates rounds once, to the copy's nearest
        change = jax.tree.map(lambda c, p: c - p, copy, params)
        return change, FloatCopyState(copy, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
