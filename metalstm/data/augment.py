"""Augmentations as jitted functions of a key: (key, images [N, H, W, ch]) -> images.

Images are floats in [0, 1] and stay so. Every image of the batch has its draw.
The factories return the same function for the same arguments, so an `EpisodeSpec` that
holds one is hashable and equal to another of the same arguments: nothing is compiled
twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metalstm.base import Array
from metalstm.checks import check_at_least, check_share

__all__ = [
    "compose",
    "crop",
    "crop_flip",
    "crop_flip_jitter",
    "flip",
    "jitter",
    "shift",
]

Augment = Callable[[Array, Array], Array]


@functools.cache
def compose(*steps: Augment) -> Augment:
    """Apply ``steps`` one after the other, each with another key."""

    def apply(key: Array, images: Array) -> Array:
        for index, step in enumerate(steps):
            images = step(jax.random.fold_in(key, index), images)
        return images

    return apply


@functools.cache
def shift(pixels: int) -> Augment:
    """Move each image by up to ``pixels`` in each direction; what comes in is 0.

    Raises:
      ValueError: if ``pixels`` is below 1.
    """
    check_at_least("pixels", pixels, 1)

    def apply(key: Array, images: Array) -> Array:
        edge = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
        padded = jnp.pad(images, edge)
        starts = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)

        def cut(image: Array, start: Array) -> Array:
            return jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:])

        return jax.vmap(cut)(padded, starts)

    return apply


@functools.cache
def flip() -> Augment:
    """Mirror each image, left for right, with probability one half."""

    def apply(key: Array, images: Array) -> Array:
        mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
        return jnp.where(mirrored, images[:, :, ::-1], images)

    return apply


@functools.cache
def crop(min_area: float = 0.4, max_stretch: float = 4 / 3) -> Augment:
    """Cut a random box out of each image and enlarge it to the image's size (linearly).

    The box holds ``min_area`` to all of the area, its sides' ratio is up to
    ``max_stretch`` times the image's, either way; log-uniform ratio, uniform area.

    Raises:
      ValueError: if ``min_area`` is outside (0, 1] or ``max_stretch`` below 1.
    """
    check_share("min_area", min_area)
    check_at_least("max_stretch", max_stretch, 1)

    def apply(key: Array, images: Array) -> Array:
        num = len(images)
        area_key, stretch_key, place_key = jax.random.split(key, 3)
        area = jax.random.uniform(area_key, (num,), minval=min_area)
        limit = jnp.log(max_stretch)
        stretch = jax.random.uniform(stretch_key, (num,), minval=-limit, maxval=limit)
        root = jnp.sqrt(area * jnp.exp(jnp.stack([stretch, -stretch])))  # [2, N]
        sides = jnp.minimum(root, 1.0)
        starts = jax.random.uniform(place_key, (2, num)) * (1 - sides)
        return jax.vmap(_enlarge)(images, starts.T, sides.T)

    return apply


def _enlarge(image: Array, start: Array, side: Array) -> Array:
    """Resize the box at ``start`` [2] with ``side`` [2], in parts of the image."""
    height, width, _ = image.shape
    across = _places(start[1], side[1], width)
    left = jnp.minimum(across.astype(jnp.int32), max(width - 2, 0))
    right = jnp.minimum(left + 1, width - 1)
    share = (across - left)[None, :, None]
    wide = image[:, left] * (1 - share) + image[:, right] * share
    # Gathers here too would be faster alone, but XLA fuses them into what follows and
    # computes them many times over, once for each use `jitter` makes of a pixel (25
    # times slower on a CPU). A product is always stored.
    down = _places(start[0], side[0], height)
    weights = jnp.maximum(0, 1 - jnp.abs(down[:, None] - jnp.arange(height)))
    return (weights @ wide.reshape(height, -1)).reshape(image.shape)


def _places(start: Array, side: Array, size: int) -> Array:
    """Return where in a line of ``size`` pixels those of its enlarged part lie."""
    pixels = size * (start + side * (jnp.arange(size) + 0.5) / size) - 0.5
    return jnp.clip(pixels, 0, size - 1)


@functools.cache
def jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> Augment:
    """Scale brightness, contrast and saturation, each by U(1 - a, 1 + a), and clip.

    Contrast is the distance to the image's mean grey, saturation that to each pixel's
    grey; one-channel images have none to change.

    Raises:
      ValueError: if an amount is outside [0, 1].
    """
    amounts = {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
    }
    for name, amount in amounts.items():
        check_share(name, amount, zero=True)

    def apply(key: Array, images: Array) -> Array:
        draws = jax.random.uniform(key, (3, len(images), 1, 1, 1), minval=-1)
        bright, sharp, vivid = (
            1 + amount * draw
            for amount, draw in zip(amounts.values(), draws, strict=True)
        )
        images = jnp.clip(images * bright, 0, 1)
        middle = _mean_grey(images)
        images = jnp.clip(middle + sharp * (images - middle), 0, 1)
        grey = _grey(images)
        return jnp.clip(grey + vivid * (images - grey), 0, 1)

    return apply


def _luma(channels: int) -> tuple[float, ...]:
    return (0.299, 0.587, 0.114) if channels == 3 else (1 / channels,) * channels


def _grey(images: Array) -> Array:
    """Return the luma [N, H, W, 1] of RGB images; the mean of other channels."""
    # Slice by slice: a sum over three neighbours in memory is slow on a CPU.
    parts = [w * images[..., c, None] for c, w in enumerate(_luma(images.shape[-1]))]
    return functools.reduce(jnp.add, parts)


def _mean_grey(images: Array) -> Array:
    """Return the mean of `_grey` over each image, [N, 1, 1, 1]."""
    num, height, width, channels = images.shape
    weights = jnp.tile(jnp.array(_luma(channels)), height * width) / (height * width)
    # As one product, several times faster than the sum over two axes.
    return (images.reshape(num, -1) @ weights)[:, None, None, None]


def crop_flip() -> Augment:
    """`crop` and `flip` with their defaults."""
    return compose(crop(), flip())


def crop_flip_jitter() -> Augment:
    """`crop`, `flip` and `jitter` with their defaults."""
    return compose(crop(), flip(), jitter())
