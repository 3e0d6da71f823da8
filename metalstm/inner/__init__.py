"""The one inner loop, and how it is differentiated."""

from metalstm.inner.differentiation import (
    Differentiation,
    Keep,
    first_order,
    second_order,
)
from metalstm.inner.loop import InnerState, Trace, unroll

__all__ = [
    "Differentiation",
    "InnerState",
    "Keep",
    "Trace",
    "first_order",
    "second_order",
    "unroll",
]
