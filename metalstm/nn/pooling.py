"""Max-pools whose derivatives are elementwise."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from metalstm.base import Array
from metalstm.nn.general_convolution import pads_of, shifted_images

__all__ = ["max_pool"]


def max_pool(
    inputs: Array,
    window_shape: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Array:
    """Pool by the maximum, as `flax.linen.max_pool` does; the arguments are its own.

    The derivative of a windowed reduction is a select-and-scatter, which XLA's CPU
    backend runs pixel by pixel; the derivatives of this one, of any order, are
    products with a mask. The first of several equal maxima takes the gradient.

    Args:
      inputs: [N, H, W, C], or [N, L, C] for a window of one axis.
      window_shape: None: 2x2 cells, [N, H, W, C] -> [N, H//2, W//2, C], where an odd
        last row or column is dropped.

    >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel()
    Array([3.], dtype=float32)
    """
    if window_shape is None:
        window_shape = strides = (2, 2)
    ndim = len(window_shape)
    strides = (1,) * ndim if strides is None else tuple(strides)
    halves = tuple(window_shape) == strides == (2, 2)
    if halves and padding == "VALID" and inputs.ndim == 4:
        return _halved(inputs)
    if jax.default_backend() != "cpu" or ndim > 2 or inputs.ndim != ndim + 2:
        return nn.max_pool(inputs, window_shape, strides, padding)
    more = (1,) * (2 - ndim)  # one axis is a row of two
    pads = pads_of(padding, inputs.shape, window_shape, strides, (1,) * ndim)
    corners = shifted_images(
        inputs.reshape(inputs.shape[0], *more, *inputs.shape[1:]),
        (*more, *window_shape),
        (*more, *strides),
        (*((0, 0) for _ in more), *pads),
        (1, 1),
        fill=-jnp.inf,
    )
    largest, *others = corners
    for corner in others:
        keeps = (largest >= corner) | jnp.isnan(largest)
        largest = jnp.where(keeps, largest, corner)
    return largest.reshape(inputs.shape[0], *largest.shape[1 + len(more) :])


@jax.custom_jvp
def _halved(x: Array) -> Array:
    return _cells(x).max((2, 4))


@_halved.defjvp
def _halved_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    cells = _cells(x)
    # corners are compared with each other, never with their maximum: XLA may compute
    # that from copies that are rounded otherwise, and equal to none of them
    largest, *others = (cells[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    first = jnp.zeros(largest.shape, jnp.int32)
    for index, corner in enumerate(others, 1):
        first = jnp.where(corner > largest, index, first)
        largest = jnp.maximum(largest, corner)
    corner = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    taken = (first[:, :, None, :, None] == corner).astype(x.dtype)
    # _halved again, not its maximum: the next derivative is this one too
    return _halved(x), (_cells(tangent) * taken).sum((2, 4))


def _cells(x: Array) -> Array:
    images, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(images, height, 2, width, 2, channels)
