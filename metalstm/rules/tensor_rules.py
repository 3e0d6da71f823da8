"""Rules for ordinary training: gates, and a small network, over normalised moments.

Notation: a tensor of n coordinates; Z features of the tensor, F of a coordinate; H
hidden units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.checks import check_at_least
from metalstm.records import recorded
from metalstm.rules.moments import (
    LEFT,
    LENGTH,
    NUM_COORDINATE,
    NUM_TENSOR,
    SIZE,
    Tensor,
    bounded_step,
    rms,
    tensor_rule,
)

__all__ = ["moment_gates", "moment_network"]


@recorded("rule")
def moment_gates(*, hidden_size: int = 8) -> UpdateRule:
    r"""Gate a mixture of momenta, by features without units.

    .. math::
        m &= c_0 g + \textstyle\sum_k c_k \hat m_k, \qquad
        i = \sigma(w_i \cdot x + b_i), \qquad f = 1 - s \, \sigma(w_f \cdot x + b_f) \
        \theta_t &= f \theta_{t-1} - s \, \frac{i m}{\mathrm{rms}(i m)}

    with averages :math:`\hat m_k` of the gradient g (decays 0.9, 0.99, 0.999, each
    divided by the weights it has so far) and the root u of its average square. The rms
    is over the tensor; a coordinate of the fraction is at most 10 in magnitude and s is
    at most e^-1, so updates are bounded. The features x [F] of a coordinate are log u
    relative to the tensor's, how consistent its momenta are, and its parameter's size.
    Step s, mixture c, weights and biases are the outputs of one layer of H tanh units
    that reads the tensor: the signal in its momenta relative to u, their angles, its
    size and shape, and the training's progress and length (`with_progress`), if known;
    log s is also linear in these.

    A fresh rule is Adam with each tensor's update of one length, which decays linearly
    where progress is known, and is shorter in longer trainings: with w_i = -1 for log
    u, i m is m / u. It reads no loss. A gradient that is not finite changes nothing,
    neither parameters nor state. The rate and weight decay of one's own go around it::

        tx = optax.chain(rule.bind(params), optax.scale_by_schedule(schedule))

    Args:
      hidden_size: H.

    Raises:
      ValueError: ``hidden_size`` is below 1; from ``update``, no parameters are given.
    """
    check_at_least("hidden_size", hidden_size, 1)

    def init(key: Array) -> PyTree:
        bias = jnp.asarray(_start(), jnp.float32)
        return {
            "hidden": _dense(key, NUM_TENSOR, hidden_size),
            "output": {"kernel": jnp.zeros((len(bias), hidden_size)), "bias": bias},
            "step": {"kernel": _start_of_step()},
        }

    return tensor_rule(init, _gated_move)


_LOG_STEP = -5.85  # of a fresh rule


def _start() -> list[float]:
    """The output's biases: log s; c; w_i, b_i; w_f, b_f."""
    rest = [0.0] * (NUM_COORDINATE - 1)
    return [_LOG_STEP, 0.1, 0.9, 0.0, 0.0, -1.0, *rest, -4.0, 0.0, *rest, -6.0]


def _start_of_step() -> Array:
    """s ~ (size of the tensor)^0.25 (length of training)^-0.4 (what is left of it)."""
    slopes = {SIZE: 0.75, LENGTH: -1.2, LEFT: 3.0}
    return jnp.array([slopes.get(k, 0.0) for k in range(NUM_TENSOR)])


def _dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    kernel = jax.random.normal(key, (outputs, inputs), jnp.float32) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _gated_move(rule: PyTree, tensor: Tensor) -> Array:
    hidden = jnp.tanh(
        rule["hidden"]["kernel"] @ tensor.features + rule["hidden"]["bias"]
    )
    out = rule["output"]["kernel"] @ hidden + rule["output"]["bias"]
    mixture = zip(out[1:5], tensor.scales, tensor.averages, strict=True)
    mixed = sum(c * scale * m for c, scale, m in mixture)
    x = _coordinate_features(tensor)

    def gate(weights: Array) -> Array:
        terms = zip(weights[:-1], x, strict=True)
        return jax.nn.sigmoid(sum((w * feature for w, feature in terms), weights[-1]))

    of_input, of_forget = jnp.split(out[5:], 2)
    log_step = out[0] + rule["step"]["kernel"] @ tensor.features
    step, move = bounded_step(gate(of_input) * mixed, log_step)
    return -step * (move + gate(of_forget) * tensor.theta)


def _coordinate_features(tensor: Tensor) -> list[Array]:
    """What the gates read: F arrays, the same when g and theta change their signs."""
    # no division of arrays but this: they cost as much as all the rest
    inverse = 1 / jnp.sqrt(tensor.square)  # rsqrt's derivative overflows at 1e-30
    bounded = lambda a: jnp.clip(a, -2, 2)  # noqa: E731
    relative = tensor.theta * (1 / tensor.size)
    current, fast, middle, slow = (
        m * (scale * inverse)
        for m, scale in zip(tensor.averages, tensor.scales, strict=True)
    )
    return [
        -jnp.log(inverse * tensor.unit),
        bounded(jnp.abs(middle)),
        bounded(current * fast),
        bounded(fast * slow),
        bounded(jnp.square(relative)),
        bounded(relative * fast),
    ]


@recorded("rule")
def moment_network(*, hidden_size: int = 8) -> UpdateRule:
    r"""Compute each update by a small network: what the gates are compared with.

    .. math::
        (d, a) = \mathrm{MLP}(y), \qquad
        \theta_t = \theta_{t-1} - s \, \frac{d e^{a / 10}}{\mathrm{rms}(d e^{a / 10})}

    after Celo2 (Moudgil et al., 2026, arXiv 2602.19142): two layers of H relu units
    read a coordinate's gradient, averages, parameter and average square, each divided
    by its rms over the tensor, and the former over u. There it has a rate of the
    user's; here log s is linear in the tensor's features, as for `moment_gates`, whose
    state, bounds and safety it shares. It has no forget gate.

    Args:
      hidden_size: H.

    Raises:
      ValueError: ``hidden_size`` is below 1; from ``update``, no parameters are given.
    """
    check_at_least("hidden_size", hidden_size, 1)

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, 3)
        return {
            "hidden": _dense(keys[0], 10, hidden_size),
            "second": _dense(keys[1], hidden_size, hidden_size),
            "output": _dense(keys[2], hidden_size, 2),
            # a fresh rule goes along the fast average over u, as Adam does
            "shortcut": {"kernel": jnp.zeros(10).at[5].set(1.0)},
            "step": {"kernel": _start_of_step(), "bias": jnp.float32(_LOG_STEP)},
        }

    return tensor_rule(init, _network_move)


def _network_move(rule: PyTree, tensor: Tensor) -> Array:
    inverse = 1 / jnp.sqrt(tensor.square)
    over_u = [
        m * (scale * inverse)
        for m, scale in zip(tensor.averages, tensor.scales, strict=True)
    ]
    lengths = [m * (1 / rms(m)) for m in tensor.averages]
    relative = tensor.theta * (1 / tensor.size)
    y = jnp.stack([*lengths, *over_u, relative, -jnp.log(inverse * tensor.unit)])

    def dense(layer: PyTree, x: Array) -> Array:
        bias = layer["bias"].reshape(-1, *(1,) * tensor.theta.ndim)
        return jnp.tensordot(layer["kernel"], x, 1) + bias

    hidden = jax.nn.relu(dense(rule["hidden"], y))
    hidden = jax.nn.relu(dense(rule["second"], hidden))
    direction, magnitude = 0.1 * dense(rule["output"], hidden)
    direction = direction + jnp.tensordot(rule["shortcut"]["kernel"], y, 1)
    log_step = rule["step"]["bias"] + rule["step"]["kernel"] @ tensor.features
    step, move = bounded_step(direction * jnp.exp(jnp.minimum(magnitude, 5)), log_step)
    return -step * move
