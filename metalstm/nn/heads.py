"""A linear head whose classes share their start, for any number of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array, Learner, LearnerState, PyTree

__all__ = ["tied_head"]


def tied_head(body: Learner) -> Learner:
    """Put a linear head on ``body`` whose classes all start from one learned vector.

    Labels are given to classes at random in every episode, so nothing can be learned
    about a particular one: the head's start is one vector [d] and one bias for all of
    them (Ye & Chao, 2021, UNICORN-MAML). The first update then moves each class's
    weights towards its own images' features. Meta-training may use another way than
    the test.

    Args:
      body: returns features [N, d], such as ``conv4(None)``.

    Returns:
      A learner with params ``{"body", "head": {"kernel" [d, 1], "bias" [1]}}`` as
      learned; `Learner.at_way` repeats the head for the classes of a task.
    """

    def init(key: Array, x: Array) -> LearnerState:
        state = body.init(key, x)
        features, _ = jax.eval_shape(lambda s: body.apply(s, x, norm="stored"), state)
        if len(features.shape) != 2:
            raise ValueError(
                f"tied_head needs a body that returns features [N, d], but it returned "
                f"shape {features.shape}: flatten them, or leave the head out with "
                "num_classes=None"
            )
        head = {
            "kernel": jnp.zeros((features.shape[-1], 1), jnp.float32),
            "bias": jnp.zeros((1,), jnp.float32),
        }
        return state._replace(params={"body": state.params, "head": head})

    def apply(state: LearnerState, x: Array, *, norm, key=None):
        inner = state._replace(params=state.params["body"])
        features, after = body.apply(inner, x, norm=norm, key=key)
        head = state.params["head"]
        return features @ head["kernel"] + head["bias"], after._replace(
            params=state.params
        )

    def at_way(params: PyTree, way: int) -> PyTree:
        head = jax.tree.map(lambda leaf: jnp.repeat(leaf, way, axis=-1), params["head"])
        return {"body": params["body"], "head": head}

    return Learner(init, apply, at_way)
