"""A 2x2 max-pool whose derivatives are elementwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array

__all__ = ["max_pool"]


@jax.custom_jvp
def max_pool(x: Array) -> Array:
    """Halve images by the maximum of each 2x2 cell; [N, H, W, C] -> [N, H//2, W//2, C].

    An odd last row or column is dropped. The first of several equal maxima takes the
    gradient. The derivative of a windowed reduction is a select-and-scatter, which
    XLA's CPU backend runs pixel by pixel; the derivatives of this one, of any order,
    are products with a mask.

    >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel()
    Array([3.], dtype=float32)
    """
    return _cells(x).max((2, 4))


@max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    cells = _cells(x)
    # corners are compared with each other, never with their maximum: XLA may compute
    # that from copies that are rounded otherwise, and equal to none of them
    largest, *others = (cells[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    first = jnp.zeros(largest.shape, jnp.int32)
    for index, corner in enumerate(others, 1):
        first = jnp.where(corner > largest, index, first)
        largest = jnp.maximum(largest, corner)
    corner = jnp.arange(4).reshape(2, 1, 2, 1)
    taken = (first[:, :, None, :, None] == corner).astype(x.dtype)
    # max_pool again, not its maximum: the next derivative is this one too
    return max_pool(x), (_cells(tangent) * taken).sum((2, 4))


def _cells(x: Array) -> Array:
    images, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(images, height, 2, width, 2, channels)
