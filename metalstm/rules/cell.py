"""One step of an LSTM with coordinates last, shared by the rules that have one.

Letters: N coordinates, H hidden units, F features. Coordinates are the last axis: they
fill the vector lanes, H does not, and all of them go through one matrix product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array

__all__ = ["init_lstm", "lstm_step", "tanh_sigmoid"]


def init_lstm(
    key: Array, num_features: int, hidden_size: int, *, forget_bias: float = 1.0
) -> dict[str, Array]:
    """Draw a kernel [4 H, F + H] from a normal of variance 1 / (F + H), cut at 2 sd.

    The bias [4 H] is zero but for the forget gate's, so that a fresh cell remembers.
    """
    fan_in = num_features + hidden_size
    shape = (4 * hidden_size, fan_in)
    kernel = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    bias = jnp.zeros(4 * hidden_size, jnp.float32)
    forget = slice(hidden_size, 2 * hidden_size)
    return {"kernel": kernel / fan_in**0.5, "bias": bias.at[forget].set(forget_bias)}


def lstm_step(
    kernel: Array, bias: Array, x: Array, hidden: Array, cell: Array
) -> tuple[Array, Array]:
    """Return the new (hidden, cell), [H, N] each.

    Args:
      kernel: [4 H, F + H], reads ``[x, hidden]``; its rows are the input gate, forget
        gate, output gate, candidate.
      bias: [4 H].
      x: [F, N].
      hidden: [H, N].
      cell: [H, N].
    """
    z = kernel @ jnp.concatenate([x, hidden]) + bias[:, None]
    i, f, o, candidate = jnp.split(z, 4)
    cell = tanh_sigmoid(f) * cell + tanh_sigmoid(i) * jnp.tanh(candidate)
    return tanh_sigmoid(o) * jnp.tanh(cell), cell


def tanh_sigmoid(x: Array) -> Array:
    """Return the sigmoid by way of tanh: five times faster than exp on XLA:CPU.

    It is blind to values below 1e-7: for an LSTM's inside, not for gates on theta.
    """
    return 0.5 * (1.0 + jnp.tanh(0.5 * x))
