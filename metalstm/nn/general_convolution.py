"""`lax.conv_general_dilated` in the form that is fast where it runs, for flax modules.

flax's layers take the function that convolves as an argument, so that a user's network
gets what `metalstm.nn.convolution` gives the built-in ones; `from_flax` sees to it.

Shapes: N images, H rows, W columns, C input channels, O output channels, G groups.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from metalstm.base import Array
from metalstm.nn.convolution import conv2d
from metalstm.runtime.compilation import platform

__all__ = ["conv_general_dilated", "pads_of", "say_once", "shifted_images"]

Pads = Sequence[tuple[int, int]]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Pads,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Array:
    """Convolve as `lax.conv_general_dilated` does; the arguments are its own.

    On a CPU, one and two image axes with the channels last, any strides, padding,
    dilation of the kernel and groups are sums of products of shifted images, whose
    derivatives of any order are fast inside a loop. Everything else is lax's; a warning
    says so once where that is slow.
    """
    ndim, dtype = lhs.ndim - 2, jnp.result_type(lhs, rhs)
    lhs_dilation = tuple(lhs_dilation or (1,) * ndim)
    rhs_dilation = tuple(rhs_dilation or (1,) * ndim)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    if platform() == "cpu":
        plain = set(lhs_dilation) == {1} and batch_group_count == 1
        plain &= preferred_element_type in (None, dtype) and _is_channels_last(numbers)
        if plain and ndim in (1, 2) and jnp.issubdtype(dtype, jnp.floating):
            pads = pads_of(
                padding, lhs.shape, rhs.shape[:-2], window_strides, rhs_dilation
            )
            # one image axis is a row of two
            more = 2 - ndim
            out = _conv2d(
                lhs.reshape(lhs.shape[0], *(1,) * more, *lhs.shape[1:]),
                rhs.reshape(*(1,) * more, *rhs.shape),
                strides=(1,) * more + tuple(window_strides),
                pads=((0, 0),) * more + tuple(pads),
                dilation=(1,) * more + rhs_dilation,
                groups=feature_group_count,
            )
            return out.reshape(out.shape[0], *out.shape[1 + more :])
        say_once(
            f"a convolution of {ndim} image axes, lhs_dilation={lhs_dilation}, {dtype}"
        )
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **options,
    )


@functools.cache
def say_once(what: str) -> None:
    warnings.warn(
        f"{what} has no fast form on a CPU and may be many times "
        "slower there inside a loop: run it on an accelerator, or build it of layers "
        "with one or two image axes",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_channels_last(numbers: lax.ConvDimensionNumbers) -> bool:
    ndim = len(numbers.lhs_spec)
    images = (0, ndim - 1, *range(1, ndim - 1))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    return numbers == lax.ConvDimensionNumbers(images, kernel, images)


def pads_of(
    padding: str | Pads,
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """Return (low, high) of each image axis of ``shape`` [N, ..., C]."""
    if not isinstance(padding, str):
        return [(low, high) for low, high in padding]
    spans = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    return lax.padtype_to_pads(shape[1:-1], spans, strides, padding)


def _conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: tuple[int, ...],
    pads: Pads,
    dilation: tuple[int, ...],
    groups: int,
) -> Array:
    """x [N, H, W, C], kernel [rows, columns, C // G, O] -> [N, H', W', O]."""
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    ones = set(strides) | set(dilation) == {1}
    same = set(map(tuple, pads)) == {(1, 1)}
    if ones and same and groups == 1 and kernel.shape[:2] == (3, 3):
        return conv2d(x, kernel, method="blocked")
    shifted = shifted_images(x, kernel.shape[:2], strides, pads, dilation)
    shape = (*shifted[0].shape[:3], kernel.shape[-1])
    if groups == 1:  # a product of matrices, as `conv2d` has it
        width = len(shifted) * x.shape[-1]
        rows = jnp.concatenate(shifted, -1).reshape(math.prod(shape[:3]), width)
        return (rows @ kernel.reshape(-1, shape[-1])).reshape(shape)
    kernel = kernel.reshape(len(shifted), *kernel.shape[2:])  # [shifts, C // G, O]
    if groups == x.shape[-1]:  # depthwise: no sum over channels
        copies = shape[-1] // groups
        terms = [
            jnp.repeat(part, copies, -1) * weights[0]
            for part, weights in zip(shifted, kernel, strict=True)
        ]
        return sum(terms[1:], terms[0])
    parts = jnp.stack(shifted, 3).reshape(*shape[:3], len(shifted), groups, -1)
    kernel = kernel.reshape(*kernel.shape[:2], groups, -1)
    return jnp.einsum("nhwkgc,kcgo->nhwgo", parts, kernel).reshape(shape)


def shifted_images(
    x: Array,
    window: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    *,
    fill: float = 0.0,
) -> list[Array]:
    """Return what each pixel of the window sees of x [N, H, W, C], [N, H', W', C]."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    x = lax.pad(x, jnp.asarray(fill, x.dtype), config)  # pads below 0 cut
    spans = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
    sizes = [
        max((size - span) // stride + 1, 0)
        for size, span, stride in zip(x.shape[1:3], spans, strides, strict=True)
    ]
    found = []
    for i in range(window[0]):
        for j in range(window[1]):
            start = (0, i * dilation[0], j * dilation[1], 0)
            ends = [
                first + max((size - 1) * stride + 1, 0) if size else first
                for first, size, stride in zip(start[1:3], sizes, strides, strict=True)
            ]
            limit = (x.shape[0], *ends, x.shape[-1])
            found.append(lax.slice(x, start, limit, (1, *strides, 1)))
    return found
