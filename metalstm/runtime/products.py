"""How precise matrix products and convolutions are.

JAX rounds the inputs of float32 products on accelerators: to bfloat16 on TPUs, to
TensorFloat-32 on GPUs. `jax.default_matmul_precision` asks for more or less. Here are
the two exceptions:

- where a small difference matters (distances, statistics, kernels of a regression, the
  gates of a rule, scores), products are in float32 on every platform, whatever is asked
  for;
- within ``jax.default_matmul_precision("bfloat16")`` the layers of `metalstm.nn`
  compute theirs in bfloat16 on every platform, a CPU included, so that what this costs
  in accuracy can be seen without an accelerator.

Parameters, states, norms and losses stay float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.runtime.compilation import platform

__all__ = ["full_precision", "layer_product", "precise_matmul"]


def full_precision() -> lax.Precision | None:
    """Return the ``precision`` of a product whose small differences matter."""
    return None if platform() == "cpu" else lax.Precision.HIGHEST


def precise_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b``, in float32 on every platform."""
    return jnp.matmul(a, b, precision=full_precision())


def layer_product(product: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """``product(*operands)``, in bfloat16 where that is asked for.

    Inputs and output are then rounded to bfloat16, and so are those of its derivatives;
    sums within the product are as the platform has them, in float32.
    """
    dtype = jnp.result_type(*operands)
    asked = jax.config.jax_default_matmul_precision
    if asked != "bfloat16" or dtype != jnp.float32:
        return product(*operands)
    if platform() == "cpu":  # which has no such product: the same numbers, as float32
        return _rounded(product(*map(_rounded, operands)))
    return product(*(x.astype(jnp.bfloat16) for x in operands)).astype(dtype)


def _rounded(x: jax.Array) -> jax.Array:
    # not a cast to and fro, which XLA may remove
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
