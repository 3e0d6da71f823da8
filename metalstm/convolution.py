"""Two-dimensional convolution in the form that is fast where it runs."""

from __future__ import annotations

from typing import Literal

import jax

from metalstm.base import Array

__all__ = ["Method", "conv2d"]

Method = Literal["xla", "slices", "blocked"]


def conv2d(
    x: Array,
    kernel: Array,
    *,
    strides: int = 1,
    padding: str = "SAME",
    method: Method | None = None,
) -> Array:
    """Convolve images [N, H, W, Cin] with a kernel [kh, kw, Cin, Cout]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
