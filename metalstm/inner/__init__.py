"""The one inner loop, and how it is differentiated."""

from metalstm.inner.loop import InnerState, Memory, Trace, unroll

__all__ = ["InnerState", "Memory", "Trace", "unroll"]
