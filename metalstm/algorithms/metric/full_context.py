"""Full context embeddings of matching networks (Vinyals et al., 2016, appendix A).

Shapes: N support and M query images, d features, all in the order of the episode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.base import Array, PyTree
from metalstm.rules.lstm_cell import init_lstm, lstm_step

__all__ = ["init_context", "query_in_context", "support_in_context"]


def init_context(key: Array, num_features: int) -> PyTree:
    """Draw three LSTMs of d units: two read the support set, one attends to it."""
    forward, backward, attention = jax.random.split(key, 3)
    size = num_features
    return {
        "forward": init_lstm(forward, size, size),
        "backward": init_lstm(backward, size, size),
        "attention": init_lstm(attention, 2 * size, size),
    }


def support_in_context(params: PyTree, support: Array) -> Array:
    """Return g(x_i, S) = h->_i + h<-_i + g'(x_i), [N, d] -> [N, d] (appendix A.2).

    The order of the support set is read, so it has to be random.
    """

    def hidden(name: str, *, reverse: bool) -> Array:
        cell = params[name]

        def step(carry, x):
            carry = lstm_step(cell["kernel"], cell["bias"], x[:, None], *carry)
            return carry, carry[0][:, 0]

        zeros = jnp.zeros((support.shape[1], 1), support.dtype)
        return lax.scan(step, (zeros, zeros), support, reverse=reverse)[1]

    forward, backward = (
        hidden("forward", reverse=False),
        hidden("backward", reverse=True),
    )
    return forward + backward + support


def query_in_context(
    params: PyTree, query: Array, support: Array, num_steps: int
) -> Array:
    """Return f(x, S) = h_K, [M, d] -> [M, d] (appendix A.1, equations 3 to 6).

    K steps of an LSTM that reads f'(x) and what it attends to::

        r_{k-1}  = sum_i softmax_i(h_{k-1} . g_i) g_i,  h_0 = c_0 = 0
        h^_k, c_k = LSTM(f'(x), [h_{k-1}, r_{k-1}], c_{k-1})
        h_k      = h^_k + f'(x)

    Args:
      support: g(x_i, S), [N, d].
      num_steps: K.
    """
    cell, inputs = params["attention"], query.T  # coordinates last, as the cell has it

    def step(carry, _):
        hidden, state = carry
        attention = jax.nn.softmax(hidden.T @ support.T)
        read = (attention @ support).T
        x = jnp.concatenate([inputs, read])
        hidden, state = lstm_step(cell["kernel"], cell["bias"], x, hidden, state)
        return (hidden + inputs, state), None

    zeros = jnp.zeros_like(inputs)
    (hidden, _), _ = lax.scan(step, (zeros, zeros), length=num_steps)
    return hidden.T
