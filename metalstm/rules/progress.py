"""Tell a transform how far training is."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree
from metalstm.checks import check_count

__all__ = ["ProgressState", "with_progress"]


class ProgressState(NamedTuple):
    step: Array  # int32, updates done
    num_steps: Array  # float32; 0: not known
    inner: PyTree  # the transform's own state


def with_progress(
    tx: optax.GradientTransformation, num_steps: int | None
) -> optax.GradientTransformationExtraArgs:
    """Pass ``progress=t / num_steps`` to every update, t = 0, 1, ... being done.

    ``num_steps`` is passed too. A rule that reads them anneals its steps by itself, and
    takes shorter ones in longer trainings. Within `optax.MultiSteps` updates
    are counted, not minibatches.

    Args:
      num_steps: updates of the whole training; None: not known, which is progress -1
        and 0 updates.
        The state holds it, so one program serves runs of every length. A restored
        state keeps its own: ``state._replace(num_steps=jnp.float32(n))`` changes it.

    Raises:
      ValueError: ``num_steps`` is no integer, or below 1.
    """
    if num_steps is not None:
        check_count("num_steps", num_steps, 1, "or None")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return ProgressState(jnp.int32(0), jnp.float32(num_steps or 0), tx.init(params))

    def update_fn(updates, state, params=None, **extra):
        share = jnp.minimum(state.step / jnp.maximum(state.num_steps, 1), 1)
        extra["progress"] = jnp.where(state.num_steps > 0, share, -1)
        extra["num_steps"] = state.num_steps
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates, ProgressState(state.step + 1, state.num_steps, inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
