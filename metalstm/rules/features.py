"""Features of a gradient or a loss; a saved rule names the version it read."""

from __future__ import annotations

import math

import jax.numpy as jnp

from metalstm.base import Array

__all__ = ["FEATURES_VERSION", "log_sign"]

FEATURES_VERSION = 1


def log_sign(x: Array, p: float = 10.0) -> tuple[Array, Array]:
    """Split x into a log-magnitude and a sign, each about [-1, 1].

    ``(log|x| / p, sign x)`` where ``|x| >= e^-p``, else ``(-1, e^p x)`` (Andrychowicz
    et al., 2016, Appendix A). The derivative is finite everywhere, at x = 0 too.

    Args:
      x: any shape.
      p: how small a magnitude still counts; e^-10 = 4.5e-5.

    >>> magnitude, sign = log_sign(jnp.array([-1.0, 0.0]))
    >>> magnitude
    Array([ 0., -1.], dtype=float32)
    >>> sign
    Array([-1.,  0.], dtype=float32)
    """
    large = jnp.abs(x) >= math.exp(-p)
    # Both branches are differentiated, so the unused one must stay finite.
    safe = jnp.where(large, x, 1.0)
    magnitude = jnp.where(large, jnp.log(jnp.abs(safe)) / p, -1.0)
    sign = jnp.where(large, jnp.sign(x), math.exp(p) * x)
    return magnitude, sign
