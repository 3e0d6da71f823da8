"""Distances and similarities of embeddings.

Shapes: M query and N support images, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metalstm.base import Array, PyTree
from metalstm.checks import check_choice
from metalstm.runtime.products import full_precision, precise_matmul

__all__ = [
    "Distance",
    "Scale",
    "class_means",
    "nearest_of_class",
    "similarities",
    "similarity_scale",
    "squared_distances",
    "unit",
]

Distance = Literal["cosine", "euclidean"]
"""``euclidean`` is the squared distance, as the papers use it."""

Scale = float | Literal["learned"] | None
"""What similarities are multiplied by; None: the default of the distance."""

_PUBLISHED_SCALE = 1.0  # of squared distances, not learned
_COSINE_SCALE = 10.0  # where a learned scale starts: cosines are too flat for a softmax


def squared_distances(a: Array, b: Array) -> Array:
    """Return the squared Euclidean distances of [M, d] and [N, d], [M, N].

    From the mean of b, and in full precision: |a|^2 - 2 ab + |b|^2 is a small
    difference of large numbers where embeddings lie close together.

    >>> squared_distances(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0], [1.0, 0.0]]))
    Array([[25.,  1.]], dtype=float32)
    """
    origin = lax.stop_gradient(b.mean(0, keepdims=True))  # no distance depends on it
    a, b = a - origin, b - origin
    cross = precise_matmul(a, b.T)
    squares = jnp.square(a).sum(-1)[:, None] + jnp.square(b).sum(-1)[None]
    return jnp.maximum(squares - 2 * cross, 0)


def unit(x: Array) -> Array:
    """Scale [..., d] to length 1; smooth at zero, where a ReLU may put features."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def similarities(a: Array, b: Array, distance: Distance) -> Array:
    """Return the cosines or minus the squared distances of [M, d] and [N, d], [M, N].

    >>> similarities(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 1.0]]), "euclidean")
    Array([[-18.]], dtype=float32)

    Raises:
      ValueError: embeddings that are not vectors.
    """
    if a.ndim != 2:
        raise ValueError(
            f"an embedding has the shape {a.shape[1:]}, but what is compared is one "
            "vector an image: flatten the learner's outputs to [N, d]"
        )
    if distance == "cosine":
        return precise_matmul(unit(a), unit(b).T)
    return -squared_distances(a, b)


def class_means(embedded: Array, labels: Array, way: int) -> Array:
    """Return the prototypes of [N, ...], [way, ...]; zero for a class without images.

    >>> class_means(jnp.array([[1.0], [3.0], [7.0]]), jnp.array([0, 0, 1]), way=2)
    Array([[2.],
           [7.]], dtype=float32)
    """
    onehot = jax.nn.one_hot(labels, way, dtype=embedded.dtype)
    sums = jnp.tensordot(onehot.T, embedded, 1, precision=full_precision())
    counts = jnp.maximum(onehot.sum(0), 1)
    return sums / counts.reshape(-1, *[1] * (embedded.ndim - 1))


def nearest_of_class(distances: Array, labels: Array, way: int) -> Array:
    """Return scores [M, way]: minus the distance [M, N] to a class's nearest image.

    >>> nearest_of_class(jnp.array([[1.0, 4.0, 2.0]]), jnp.array([0, 0, 1]), way=2)
    Array([[-1., -2.]], dtype=float32)
    """
    is_class = labels[None, :] == jnp.arange(way)[:, None]
    return -jnp.where(is_class[None], distances[:, None, :], jnp.inf).min(-1)


def similarity_scale(
    distance: Distance, scale: Scale
) -> tuple[PyTree, Callable[[PyTree], Any]]:
    """Return the learned parameters of a scale and how the scale is read from them.

    The parameters are {} where the scale is fixed. A learned scale stays positive,
    since its logarithm is what is learned.

    Args:
      distance: "euclidean" has the default 1 as published; "cosine" learns its scale
        from 10.
      scale: a number, "learned", or None for the default of the distance.

    Raises:
      ValueError: a distance that does not exist, or a scale that is neither positive
        nor "learned".
    """
    check_choice("distance", distance, get_args(Distance))
    cosine = distance == "cosine"
    start = _COSINE_SCALE if cosine else _PUBLISHED_SCALE
    if scale == "learned" or (scale is None and cosine):
        log_scale = {"log_scale": np.float32(math.log(start))}
        return log_scale, lambda params: jnp.exp(params["log_scale"])
    if scale is None:
        return {}, lambda params: start
    number: Any = scale  # the types allow no other string, a caller may give one
    if isinstance(number, str) or not number > 0:
        raise ValueError(f"scale={scale!r}: choose a number above 0, or 'learned'")
    return {}, lambda params: scale
