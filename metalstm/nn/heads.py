"""A linear head whose classes share their start, for any number of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array, Learner, LearnerState, PyTree
from metalstm.batches import to_rank_of
from metalstm.checks import check_features, check_positive
from metalstm.records import recorded
from metalstm.runtime.products import precise_matmul

__all__ = ["output_shape", "tied_head"]


def output_shape(
    learner: Learner, state: LearnerState, x: Array
) -> jax.ShapeDtypeStruct:
    """Return the shape and type of the outputs for ``x``; nothing is computed."""
    outputs, _ = jax.eval_shape(lambda s: learner.apply(s, x, norm="stored"), state)
    return outputs


@recorded("learner")
def tied_head(body: Learner, feature_length: float | None = None) -> Learner:
    """Put a linear head on ``body`` whose classes all start from one learned vector.

    Labels are given to classes at random in every episode, so nothing can be learned
    about a particular one: the head's start is one vector [d] and one bias for all of
    them (Ye & Chao, 2021, UNICORN-MAML). The first update then moves each class's
    weights towards the features of its images. Meta-training may use another way than
    the test.

    Args:
      body: returns features [N, d], such as ``conv4(None)``.
      feature_length: scale every feature vector to this Euclidean norm before the head.
        A step size of the head then fits any number of features, pixels and shots, and
        from a head of zeros one small step is the nearest centroid by cosine. None: the
        features as they are.

    Returns:
      A learner with params ``{"body", "head": {"kernel" [d, 1], "bias" [1]}}`` as
      learned; `Learner.at_way` repeats the head for the classes of a task.

    Raises:
      ValueError: ``feature_length`` is not above 0; on initialisation, features that
        are not [N, d].
    """
    if feature_length is not None:
        check_positive("feature_length", feature_length)

    def init(key: Array, x: Array) -> LearnerState:
        state = body.init(key, x)
        features = output_shape(body, state, x)
        remedy = "flatten them, or omit the body's head with num_classes=None"
        check_features(features.shape, "tied_head", remedy)
        head = {
            "kernel": jnp.zeros((features.shape[-1], 1), jnp.float32),
            "bias": jnp.zeros((1,), jnp.float32),
        }
        return state._replace(params={"body": state.params, "head": head})

    def apply(state: LearnerState, x: Array, *, norm, key=None):
        inner = state._replace(params=state.params["body"])
        features, after = body.apply(inner, x, norm=norm, key=key)
        if feature_length is not None:
            # the small term keeps the derivative of features that are all 0 finite
            squares = jnp.sum(features * features, -1, keepdims=True) + 1e-12
            features = feature_length * features / jnp.sqrt(squares)
        head = state.params["head"]
        outputs = precise_matmul(features, head["kernel"])
        outputs = outputs + to_rank_of(head["bias"], outputs)
        return outputs, after._replace(params=state.params)

    def at_way(params: PyTree, way: int) -> PyTree:
        head = jax.tree.map(lambda leaf: jnp.repeat(leaf, way, axis=-1), params["head"])
        return {"body": params["body"], "head": head}

    return Learner(init, apply, at_way)
