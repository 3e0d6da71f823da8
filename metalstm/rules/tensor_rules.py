"""Rules for ordinary training: gates, a small network, an LSTM; normalised moments.

Notation: a tensor of n coordinates; Z features of the tensor, F of a coordinate; H
hidden units.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.checks import check_at_least
from metalstm.records import recorded
from metalstm.rules.lstm_cell import init_lstm
from metalstm.rules.moments import (
    LEFT,
    LENGTH,
    NUM_COORDINATE,
    NUM_TENSOR,
    SIZE,
    Tensor,
    bounded_step,
    tensor_rule,
)

__all__ = ["moment_gates", "moment_lstm", "moment_network"]


@recorded("rule")
def moment_gates(
    *, hidden_size: int = 8, orthogonal: bool = False, normalise: bool = True
) -> UpdateRule:
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
      orthogonal: of tensors of two axes or more, as matrices of all axes but the last
        by the last, orthogonalise i m before it is divided by its rms, as Muon does
        (Jordan et al., 2024). Sharded matrices are then gathered, which needs a mesh
        with automatic axes (``axis_types=(AxisType.Auto, ..)`` of `jax.make_mesh`).
      normalise: False divides i m by what its rms would be were all gradients the same,
        with the gates of a fresh rule, so that the length of an update changes with how
        consistent gradients are, as Adam's does.

    Raises:
      ValueError: ``hidden_size`` is below 1, or ``orthogonal`` without ``normalise``;
        from ``update``, no parameters are given.
    """
    check_at_least("hidden_size", hidden_size, 1)
    if orthogonal and not normalise:
        raise ValueError(
            "orthogonal=True, normalise=False: an orthogonal update has one length; "
            "choose one of the two"
        )

    def init(key: Array) -> PyTree:
        bias = jnp.asarray(_start(), jnp.float32)
        return {
            "hidden": _dense(key, NUM_TENSOR, hidden_size),
            "output": {
                "kernel": jnp.zeros((len(bias), hidden_size), jnp.float32),
                "bias": bias,
            },
            "step": {"kernel": _start_of_step()},
        }

    return tensor_rule(init, functools.partial(_gated_move, orthogonal, normalise))


_LOG_STEP, _INPUT_BIAS = -5.85, -4.0  # of a fresh rule


def _start() -> list[float]:
    """The output's biases: log s; c; w_i, b_i; w_f, b_f."""
    rest = [0.0] * (NUM_COORDINATE - 1)
    return [_LOG_STEP, 0.1, 0.9, 0.0, 0.0, -1.0, *rest, _INPUT_BIAS, 0.0, *rest, -6.0]


def _start_of_step() -> Array:
    """s ~ (size of the tensor)^0.25 (length of training)^-0.4 (what is left of it)."""
    slopes = {SIZE: 0.75, LENGTH: -1.2, LEFT: 3.0}
    return jnp.array([slopes.get(k, 0.0) for k in range(NUM_TENSOR)], jnp.float32)


def _dense(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    kernel = jax.random.normal(key, (outputs, inputs), jnp.float32) / inputs**0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def _gated_move(
    orthogonal: bool, normalise: bool, rule: PyTree, tensor: Tensor
) -> tuple[Array, tuple[()]]:
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
    usual = tensor.unit * jax.nn.sigmoid(_INPUT_BIAS)
    length = None if normalise else usual
    step, move = bounded_step(gate(of_input) * mixed, log_step, orthogonal, length)
    return -step * (move + gate(of_forget) * tensor.theta), ()


def _coordinate_features(tensor: Tensor) -> list[Array]:
    """What the gates read: F arrays, the same when g and theta change their signs."""
    bounded = lambda a: jnp.clip(a, -2, 2)  # noqa: E731
    (current, fast, middle, slow), relative, log_u = _without_units(tensor)
    return [
        log_u,
        bounded(jnp.abs(middle)),
        bounded(current * fast),
        bounded(fast * slow),
        bounded(jnp.square(relative)),
        bounded(relative * fast),
    ]


def _without_units(tensor: Tensor) -> tuple[list[Array], Array, Array]:
    """The averages over u, theta over its rms, and log u relative to the tensor's."""
    # no division of arrays but this: they cost as much as all the rest
    inverse = 1 / jnp.sqrt(tensor.square)  # rsqrt's derivative overflows at 1e-30
    over_u = [
        m * (scale * inverse)
        for m, scale in zip(tensor.averages, tensor.scales, strict=True)
    ]
    relative = tensor.theta * (1 / tensor.size)
    return over_u, relative, -jnp.log(inverse * tensor.unit)


@recorded("rule")
def moment_network(*, hidden_size: int = 8, orthogonal: bool = False) -> UpdateRule:
    r"""Compute each update by a small network: what the gates are compared with.

    .. math::
        (d, a) = \mathrm{MLP}(y), \qquad
        \theta_t = \theta_{t-1} - s \, \frac{d e^{a / 10}}{\mathrm{rms}(d e^{a / 10})}

    after Celo2 (Moudgil et al., 2026, arXiv 2602.19142): two layers of H relu units
    read a coordinate's gradient, averages, parameter and average square, each divided
    by its rms over the tensor, and the former over u. Celo2 reads 30 inputs, which have
    Adafactor's row and column averages too, its published d has no factor e^(a / 10),
    biases are Adam's, and matrices are orthogonalised (``orthogonal``). There it has a
    rate of the user's; here log s is linear in the tensor's features, as for
    `moment_gates`, whose state, bounds and safety it shares. It has no forget gate.

    Args:
      hidden_size: H.
      orthogonal: as for `moment_gates`, of the fraction's numerator.

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
            "shortcut": {"kernel": jnp.zeros(10, jnp.float32).at[5].set(1.0)},
            "step": {"kernel": _start_of_step(), "bias": jnp.float32(_LOG_STEP)},
        }

    return tensor_rule(init, functools.partial(_network_move, orthogonal))


def _network_move(
    orthogonal: bool, rule: PyTree, tensor: Tensor
) -> tuple[Array, tuple[()]]:
    over_u, relative, log_u = _without_units(tensor)
    pairs = zip(tensor.averages, tensor.lengths, strict=True)
    lengths = [m * (1 / length) for m, length in pairs]
    y = jnp.stack([*lengths, *over_u, relative, log_u])
    hidden = jax.nn.relu(_apply(rule["hidden"], y))
    hidden = jax.nn.relu(_apply(rule["second"], hidden))
    direction, magnitude = 0.1 * _apply(rule["output"], hidden)
    direction = direction + jnp.tensordot(rule["shortcut"]["kernel"], y, 1)
    log_step = rule["step"]["bias"] + rule["step"]["kernel"] @ tensor.features
    move = direction * jnp.exp(jnp.minimum(magnitude, 5))
    step, move = bounded_step(move, log_step, orthogonal)
    return -step * tensor.moved * move, ()


def _apply(layer: PyTree, x: Array) -> Array:
    """A layer of every coordinate: from [inputs, ...] to [outputs, ...]."""
    bias = layer["bias"].reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.tensordot(layer["kernel"], x, 1) + bias


@recorded("rule")
def moment_lstm(*, hidden_size: int = 8, orthogonal: bool = False) -> UpdateRule:
    r"""Compute each update by an LSTM: `l2l` with what `moment_gates` reads.

    .. math::
        h_t &= \mathrm{LSTM}(y_t, z_t, h_{t-1}), \qquad
        d = v \cdot \hat m / u + w \cdot h_t \\
        \theta_t &= \theta_{t-1} - s \, d / \mathrm{rms}(d)

    after Andrychowicz et al. (2016), the inputs after Lv et al. (2017): y has a
    coordinate's gradient and averages over u, its parameter over the tensor's rms, and
    log u relative to the tensor's; z the tensor's features, in which log s is linear.
    Bounds and safety are those of `moment_gates`; a fresh rule goes along the fast
    average, as Adam does. Its state has 4 + 2 H floats a parameter. It has no other
    forget gate than the cell's.

    Args:
      hidden_size: H.
      orthogonal: as for `moment_gates`, of d.

    Raises:
      ValueError: ``hidden_size`` is below 1; from ``update``, no parameters are given.
    """
    check_at_least("hidden_size", hidden_size, 1)

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key)
        kernel = jax.random.normal(keys[1], (hidden_size,), jnp.float32)
        return {
            "lstm": init_lstm(keys[0], 6, hidden_size),
            "tensor": {"kernel": jnp.zeros((4 * hidden_size, NUM_TENSOR), jnp.float32)},
            "output": {"kernel": 0.1 * kernel / hidden_size**0.5},
            "shortcut": {"kernel": jnp.zeros(4, jnp.float32).at[1].set(1.0)},
            "step": {"kernel": _start_of_step(), "bias": jnp.float32(_LOG_STEP)},
        }

    def memory(theta: Array) -> tuple[Array, Array]:
        shape = (hidden_size, *theta.shape)
        return jnp.zeros(shape, theta.dtype), jnp.zeros(shape, theta.dtype)

    return tensor_rule(init, functools.partial(_lstm_move, orthogonal), memory)


def _lstm_move(
    orthogonal: bool, rule: PyTree, tensor: Tensor
) -> tuple[Array, tuple[Array, Array]]:
    hidden, cell = tensor.memory
    over_u, relative, log_u = _without_units(tensor)
    # 1 / rms and the derivative of log u overflow together where no gradient has been
    log_u = jax.lax.stop_gradient(log_u)
    inputs = jnp.concatenate([jnp.stack([*over_u, relative, log_u]), hidden])
    bias = rule["lstm"]["bias"] + rule["tensor"]["kernel"] @ tensor.features
    gates = _apply({"kernel": rule["lstm"]["kernel"], "bias": bias}, inputs)
    i, f, o, candidate = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(candidate)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    move = jnp.tensordot(rule["output"]["kernel"], hidden, 1)
    move = move + jnp.tensordot(rule["shortcut"]["kernel"], jnp.stack(over_u), 1)
    log_step = rule["step"]["bias"] + rule["step"]["kernel"] @ tensor.features
    step, move = bounded_step(move, log_step, orthogonal)
    return -step * tensor.moved * move, (hidden, cell)
