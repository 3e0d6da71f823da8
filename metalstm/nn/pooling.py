"""Max-pools whose derivatives are elementwise."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import pooling as flax_pooling
from jax import lax

from metalstm.base import Array
from metalstm.nn.general_convolution import pads_of, say_once, shifted_images
from metalstm.runtime.compilation import platform

__all__ = ["fast_flax_pools", "max_pool", "scaled_max_pool"]


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
        return _pool(inputs, None, None)
    is_plain = ndim <= 2 and inputs.ndim == ndim + 2
    if platform() != "cpu" or not is_plain:
        if ndim > 2 and platform() == "cpu":
            say_once(f"a max-pool of {ndim} image axes")
        pool = _flax_pool.__wrapped__
        return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)
    more = (1,) * (2 - ndim)  # one axis is a row of two
    pads = pads_of(padding, inputs.shape, window_shape, strides, (1,) * ndim)
    window = _Window(
        (*more, *window_shape),
        (*more, *strides),
        (*((0, 0) for _ in more), *((low, high) for low, high in pads)),
    )
    images = inputs.reshape(inputs.shape[0], *more, *inputs.shape[1:])
    out = _pool(images, None, window)
    return out.reshape(inputs.shape[0], *out.shape[1 + len(more) :])


def scaled_max_pool(x: Array, slope: Array) -> Array:
    """Return the max-pool of slope * x over 2x2 cells, scaling only what remains.

    The largest slope * x is slope times the largest x of a cell, or where the slope is
    negative the smallest: three quarters of the products are saved, in every pass.

    Args:
      x: [N, H, W, C]; an odd last row or column is dropped.
      slope: [C] or [N, 1, 1, C].

    >>> scaled_max_pool(jnp.arange(8.0).reshape(1, 2, 2, 2), jnp.array([1.0, -1.0]))
    Array([[[[ 6., -1.]]]], dtype=float32)
    """
    sign = lax.stop_gradient(jnp.where(slope < 0, -1.0, 1.0).astype(x.dtype))
    if platform() == "cpu":
        return (sign * slope) * max_pool(sign * x)
    # within the comparisons: all corners would read a product from memory
    return slope * _pool(x, sign, None)


class _Window(NamedTuple):
    """Of two image axes, each."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pool(x: Array, sign: Array | None, window: _Window | None) -> Array:
    """x [N, H, W, C]; ``window`` None: 2x2 cells. ``sign``: see `scaled_max_pool`."""
    largest = functools.reduce(jnp.maximum, _corners(x, sign, window, -jnp.inf))
    return largest if sign is None else sign * largest


@_pool.defjvp
def _pool_jvp(window, primals, tangents):
    (x, sign), (tangent, _) = primals, tangents
    # corners are compared with each other, never with their maximum: XLA may compute
    # that from copies that are rounded otherwise, and equal to none of them
    largest, *others = _corners(x, sign, window, -jnp.inf)
    first = jnp.zeros(largest.shape, jnp.int8 if len(others) < 127 else jnp.int32)
    for index, corner in enumerate(others, 1):
        larger = corner > largest
        first = jnp.where(larger, jnp.asarray(index, first.dtype), first)
        largest = jnp.where(larger, corner, largest)
    if platform() == "cpu":
        # else XLA fuses the comparisons into every use of them, pixel by pixel
        first = lax.optimization_barrier(first)
    # _pool again, not its maximum: the next derivative is this one too
    return _pool(x, sign, window), _taken(tangent, first, window)


def _corners(
    x: Array, sign: Array | None, window: _Window | None, fill: float
) -> list[Array]:
    """What each place of the window sees, times ``sign``, each [N, H', W', C]."""
    if window is not None:
        corners = shifted_images(x, *window, (1, 1), fill=fill)
    elif platform() != "cpu":  # rows and columns are no axes of a TPU's tiles
        pads = ((0, 0), (0, 0))
        corners = shifted_images(x, (2, 2), (2, 2), pads, (1, 1))
    else:
        images, height, width, channels = x.shape
        # pairs of pixels side by side: a slice of whole vectors
        pairs = x[:, : height // 2 * 2, : width // 2 * 2].reshape(
            images, height // 2, 2, width // 2, 2 * channels
        )
        halves = slice(None, channels), slice(channels, None)
        corners = [pairs[:, :, i, :, half] for i in (0, 1) for half in halves]
    return corners if sign is None else [sign * corner for corner in corners]


def _taken(x: Array, first: Array, window: _Window | None) -> Array:
    """Take corner ``first`` [N, H', W', C] of every window of x [N, H, W, C]."""
    if window is not None:
        taken, *others = _corners(x, None, window, 0.0)
        for index, corner in enumerate(others, 1):
            taken = jnp.where(first == index, corner, taken)
        return taken
    images, height, width, channels = first.shape
    x = x[:, : 2 * height, : 2 * width]
    if platform() != "cpu":
        return _taken_by_windows(x, first)
    cells = x.reshape(images, height, 2, width, 2, channels)
    corner = jnp.arange(4, dtype=first.dtype).reshape(1, 1, 2, 1, 2, 1)
    is_taken = first[:, :, None, :, None] == corner
    return jnp.where(is_taken, cells, jnp.zeros((), x.dtype)).sum((2, 4))


def _taken_by_windows(x: Array, first: Array) -> Array:
    """As `_taken`, of 2x2 cells, without arrays that have an axis for a cell's rows.

    XLA's TPU compiler writes such arrays of six axes to memory. The transpose of a
    windowed sum is another, of the cotangent with zeros in between, which it fuses.
    """
    cell = (1, 2, 2, 1)
    rows, columns = (jnp.arange(size) % 2 for size in x.shape[1:3])
    corner = (2.0 * rows[:, None] + columns)[:, :, None]
    spread = lax.reduce_window(
        first.astype(corner.dtype),
        0.0,
        lax.add,
        cell,
        (1, 1, 1, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
        base_dilation=cell,
    )
    taken = jnp.where(spread == corner, x, jnp.zeros((), x.dtype))
    return lax.reduce_window(taken, 0.0, lax.add, cell, cell, "VALID")


# flax's functions that pool take no function as an argument, as its convolutions do.
# All of them call this one, which is flax's own wherever `fast_flax_pools` is not.
_fast = contextvars.ContextVar("_fast", default=False)


@functools.wraps(flax_pooling.pool)
def _flax_pool(inputs, init, reduce_fn, window_shape, strides, padding) -> Any:
    if _fast.get() and reduce_fn is lax.max and isinstance(init, float):
        return max_pool(inputs, tuple(window_shape), strides, padding)
    pool = _flax_pool.__wrapped__
    return pool(inputs, init, reduce_fn, window_shape, strides, padding)


@contextlib.contextmanager
def fast_flax_pools() -> Iterator[None]:
    """Let `max_pool` compute flax's max-pools within, in this thread."""
    flax_pooling.pool = _flax_pool  # not before a module of a user runs
    token = _fast.set(True)
    try:
        yield
    finally:
        _fast.reset(token)
