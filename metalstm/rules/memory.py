"""A memory of past gradients, and the two-layer rule it makes with gates.

Notation: N coordinates (all the parameters, flattened), H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.records import recorded
from metalstm.rules.classic import chain
from metalstm.rules.features import log_sign
from metalstm.rules.flat import coordinate_dtype, flatten, leaf_sizes, unflatten
from metalstm.rules.gates import lstm_gates
from metalstm.rules.lstm_cell import init_lstm, lstm_step
from metalstm.runtime.products import precise_matmul

__all__ = ["MemoryState", "gradient_memory", "two_layer"]

# Where each bias starts. "adam": a momentum of 0.9, averaged (0.9 + 0.1), over an RMS
# of 0.99, which is Adam without its bias correction. "gradient": nearly the gradient
# itself. A sigmoid at 0 or 1 would have no slope, so that both are approximate.
_STARTS = {
    "adam": {
        "forget": 2.1972246,  # f_c = 0.9
        "input": -2.1972246,  # i_c = 0.1
        "decay": 4.5951199,  # f_v = 0.99
        "exponent": 3.0,  # gamma = 0.953
        "scale": 0.0,  # e^s = 1
    },
    "gradient": {
        "forget": -4.0,  # f_c = 0.018
        "input": 4.0,  # i_c = 0.982
        "decay": 0.0,  # f_v = 0.5
        "exponent": -6.0,  # gamma = 0.0025
        "scale": 0.0,
    },
}


class MemoryState(NamedTuple):
    hidden: Array  # [H, N] the LSTM's output
    cell: Array  # [H, N] its cell
    momentum: Array  # [N] c
    square: Array  # [N] v


@recorded("rule")
def gradient_memory(
    *,
    hidden_size: int = 20,
    p: float = 10.0,
    eps: float = 1e-8,
    init_scale: float = 0.01,
    start: Literal["adam", "gradient"] = "adam",
) -> UpdateRule:
    r"""Turn each gradient into a memory of past ones, as momentum and RMSprop do.

    .. math::
        h_t &= \mathrm{LSTM}(\phi(\nabla_t), h_{t-1}) \\
        c_t &= f_c c_{t-1} + i_c \nabla_t \\
        v_t &= f_v v_{t-1} + (1 - f_v) \nabla_t^2 \\
        m_t &= e^s c_t / (v_t + \epsilon)^{\gamma / 2}

    f_c, i_c, f_v and gamma are sigmoids, s is free; each of the five is bias + kernel .
    h_t. c and v are linear in the gradient and its square, so that with kernels of zero
    biases alone make SGD (f_c = 0, i_c = 1, gamma = 0), momentum (gamma = 0) or RMSprop
    (f_c = 0, gamma = 1), e^s being the rate. phi is `log_sign`; all states start at 0.

    m_t looks like a gradient: its sign is *not* reversed. Chain it into `lstm_gates`
    (which is `two_layer`), `learned_sgd` or ``optax.scale(-rate)``.

    In second-order mode no derivative flows through phi, where it would be up to e^p.

    Args:
      hidden_size: H.
      p: of `log_sign`.
      eps: epsilon.
      init_scale: the five kernels are drawn from U(-scale, scale). The LSTM starts as
        `l2l`'s does.
      start: what the biases make of m before they are meta-trained: ``"adam"``, a
        momentum of 0.9 over an RMS of 0.99, or ``"gradient"``, nearly the gradient,
        so that what comes after the memory starts as it would without one.

    Raises:
      ValueError: an argument that is not positive, or another start.
    """
    check_at_least("hidden_size", hidden_size, 1)
    check_positive("p", p)
    check_positive("eps", eps)
    check_choice("start", start, _STARTS)
    biases = _STARTS[start]

    def init(key: Array, params: PyTree) -> PyTree:
        del params
        lstm_key, *keys = jax.random.split(key, 1 + len(biases))
        rule: dict[str, Any] = {"lstm": init_lstm(lstm_key, 2, hidden_size)}
        for (name, bias), name_key in zip(biases.items(), keys, strict=True):
            kernel = jax.random.uniform(
                name_key, (hidden_size,), jnp.float32, -init_scale, init_scale
            )
            rule[name] = {"kernel": kernel, "bias": jnp.float32(bias)}
        return rule

    def bind(rule: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            total = sum(leaf_sizes(params))
            dtype = coordinate_dtype(params)
            shapes = [(hidden_size, total)] * 2 + [(total,)] * 2
            return MemoryState(*(jnp.zeros(shape, dtype) for shape in shapes))

        def update_fn(updates, state, params=None, **extra):
            del extra
            g = flatten(updates)
            weights = jax.tree.map(lambda w: jnp.asarray(w, g.dtype), rule)
            lstm = weights["lstm"]
            x = lax.stop_gradient(jnp.stack(log_sign(g, p)))
            hidden, cell = lstm_step(
                lstm["kernel"], lstm["bias"], x, state.hidden, state.cell
            )
            heads = [weights[name] for name in biases]
            kernel = jnp.stack([head["kernel"] for head in heads])  # [5, H]
            bias = jnp.stack([head["bias"] for head in heads])
            logits = precise_matmul(kernel, hidden) + bias[:, None]
            forget, inp, decay, exponent, scale = logits

            c = jax.nn.sigmoid(forget) * state.momentum + jax.nn.sigmoid(inp) * g
            # 1 - f_v = sigmoid(-logit) keeps its digits where f_v is near 1
            v = jax.nn.sigmoid(decay) * state.square + jax.nn.sigmoid(-decay) * g**2
            power = 0.5 * jax.nn.sigmoid(exponent)
            m = c * jnp.exp(scale - power * jnp.log(v + eps))
            updates = unflatten(m, updates, params)
            return updates, MemoryState(hidden, cell, c, v)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    return UpdateRule(init, bind, traits)


@recorded("rule")
def two_layer(
    *,
    memory: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
) -> UpdateRule:
    r"""Apply gates to a memory of past gradients: the two-layer rule (v2).

    .. math::
        m_t &= \mathrm{memory}(\nabla_t) \\
        \theta_t &= f_t \theta_{t-1} - i_t m_t

    with f_t and i_t read from features of m_t and of the loss, theta_{t-1}, and their
    own previous values. The published Meta-LSTM differs: its first LSTM feeds only the
    gates, and the raw gradient is what is added.

    Args:
      memory: arguments of `gradient_memory`.
      gates: arguments of `lstm_gates`. Unless they say otherwise, ``hidden_size=0`` (no
        second LSTM) and ``feature_gradient="full"``: the features of m_t are how the
        memory's parameters learn from the gates, so their derivative must not stop.

    Returns:
      The chain of the two; its parameters are the pair of theirs. ``value=`` (the loss)
      is needed unless ``gates`` has ``loss_input=False``.
    """
    defaults: dict[str, Any] = {"hidden_size": 0, "feature_gradient": "full"}
    return chain(
        gradient_memory(**(memory or {})), lstm_gates(**(defaults | dict(gates or {})))
    )
