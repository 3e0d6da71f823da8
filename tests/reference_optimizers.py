"""Learned optimizers in numpy float64, written from the papers' equations.

One coordinate a row, as in `reference`. N coordinates, H hidden units, T updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from reference import Array, Lstm, MetaLstm, Objective, Record, log_sign, sigmoid


class L2L(NamedTuple):
    layers: list[Lstm]
    weights: Array  # [H]
    bias: float
    scale: float
    p: float | None  # None: raw gradients
    moments: bool = False  # reads averages, as Adam does
    shortcut: Array | None = None  # [4]
    relative: bool = False


def unroll_l2l(
    rule: L2L,
    theta: Array,
    objective: Objective,
    num_steps: int,
    *,
    held: Sequence[Array] | None = None,
) -> tuple[Array, Array, list[Array]]:
    """Andrychowicz et al. (2016), section 2.1: thetas [T, N], losses [T], gradients.

    ``held``: gradients to use instead of those at theta (second derivatives dropped).
    """
    num = theta.size
    states = [(np.zeros((num, len(x.bias) // 4)),) * 2 for x in rule.layers]
    thetas, losses, gradients = [], [], []
    history: list[Array] = []
    for t in range(num_steps):
        loss, gradient = objective(theta)
        if held is not None:
            gradient = held[t]
        history.append(gradient)
        x = gradient[:, None] if rule.p is None else log_sign(gradient, rule.p)
        averages, unit = _weighted_averages(np.stack(history))
        if rule.moments:
            x = np.concatenate([averages, x], 1)
        for k, layer in enumerate(rule.layers):
            states[k] = layer.step(x, *states[k])
            x = states[k][0]
        delta = x @ rule.weights + rule.bias
        if rule.shortcut is not None:
            delta = delta + averages @ rule.shortcut
        theta = theta + rule.scale * (unit if rule.relative else 1.0) * delta
        thetas.append(theta)
        losses.append(loss)
        gradients.append(gradient)
    return np.stack(thetas), np.array(losses), gradients


def _weighted_averages(history: Array) -> tuple[Array, Array]:
    """[T, N] gradients -> the last and their means over their RMS, [N, 4]; RMS [N].

    An exponential average, corrected for its start, is a weighted mean of the history.
    """
    age = np.arange(len(history))[::-1, None]
    mean = lambda x, decay: (decay**age * x).sum(0) / (decay**age).sum()  # noqa: E731
    unit = np.sqrt(mean(history**2, 0.98) + 1e-16)
    rows = [history[-1]] + [mean(history, decay) for decay in (0.5, 0.9, 0.99)]
    return np.stack(rows, 1) / unit[:, None], unit


class Memory(NamedTuple):
    """One row of ``heads`` for each of f_c, i_c, f_v, gamma, s."""

    lstm: Lstm
    heads: Array  # [5, H]
    biases: Array  # [5]
    eps: float = 1e-8


def unroll_two_layer(
    memory: Memory,
    gates: MetaLstm,
    theta: Array,
    objective: Objective,
    num_steps: int,
    *,
    held: Sequence[Record] | None = None,
) -> tuple[Array, list[Record]]:
    """theta_t = f_t theta_{t-1} - i_t m_t: thetas [T, N], and what was read.

    The gates carry their logits. ``held`` as in `reference.unroll_meta_lstm`.
    """
    num = theta.size
    h, cell = np.zeros((2, num, len(memory.heads[0])))
    width = 0 if gates.lstm is None else gates.lstm.recurrent.shape[1]
    gates_h, gates_cell = np.zeros((2, num, width))
    c, v, f_logit, i_logit = np.zeros((4, num))
    thetas, records = [], []
    for t in range(num_steps):
        now = Record(*objective(theta)) if held is None else held[t]
        g = now.gradient
        h, cell = memory.lstm.step(log_sign(g), h, cell)
        said = h @ memory.heads.T + memory.biases
        f_c, i_c, f_v, gamma = sigmoid(said[:, :4]).T
        c = f_c * c + i_c * g
        v = f_v * v + (1 - f_v) * g**2
        m = np.exp(said[:, 4]) * c / (v + memory.eps) ** (gamma / 2)

        features = np.hstack([np.tile(log_sign(now.loss), (num, 1)), log_sign(m)])
        if gates.lstm is not None:
            gates_h, gates_cell = gates.lstm.step(features, gates_h, gates_cell)
            features = gates_h
        f_logit = gates.forget.logit(features, theta, f_logit)
        i_logit = gates.input.logit(features, theta, i_logit)
        theta = sigmoid(f_logit) * theta - sigmoid(i_logit) * m
        thetas.append(theta)
        records.append(now)
    return np.stack(thetas), records


class MomentGates(NamedTuple):
    hidden: tuple[Array, Array]  # kernel [H, 15], bias [H]
    output: tuple[Array, Array]  # kernel [19, H], bias [19]
    step: Array  # [15]


class Moments(NamedTuple):
    count: int
    means: tuple[Array, Array, Array]
    square: Array


class Read(NamedTuple):
    """What the rules for ordinary training know of a tensor, and its new averages."""

    moments: Moments
    averages: Array  # [4, ...], the gradient first
    u: Array
    relative: Array
    z: Array  # [16]


def read_tensor(
    theta: Array,
    g: Array,
    old: Moments,
    progress: float | None,
    num_steps: int | None,
) -> Read:
    count = old.count + 1
    betas = (0.9, 0.99, 0.999)
    means = tuple(b * m + (1 - b) * g for b, m in zip(betas, old.means, strict=True))
    square = 0.99 * old.square + 0.01 * g**2
    fast, middle, slow = (m / (1 - b**count) for b, m in zip(betas, means, strict=True))
    u = np.sqrt(square / (1 - 0.99**count))
    angle = lambda a, b: np.mean(a * b) / (rms(a) * rms(b))  # noqa: E731
    fan_in = np.prod(theta.shape[:-1]) if theta.ndim > 1 else 1.0
    done = 0.0 if progress is None else progress
    z = np.array(
        [
            *(np.log(rms(m) / rms(u)) / 3 for m in (g, fast, middle, slow)),
            angle(g, fast),
            angle(fast, slow),
            angle(fast, theta),
            np.log(rms(theta) + 1e-3) / 3 + 1,
            np.log(theta.size) / 3 - 2,
            np.log(fan_in) / 3 - 1,
            theta.ndim > 1,
            np.log(count) / 3 - 2,
            done,
            progress is not None,
            np.log(1.01 - done) / 3,
            np.log((num_steps or 1000) / 1000) / 3,
        ]
    )
    averages = np.stack([g, fast, middle, slow])
    return Read(Moments(count, means, square), averages, u, theta / rms(theta), z)


def rms(x: Array) -> Array:
    return np.sqrt(np.mean(x**2))


def moment_gates_step(
    rule: MomentGates,
    theta: Array,
    g: Array,
    old: Moments,
    progress: float | None,
    num_steps: int | None,
) -> tuple[Array, Moments]:
    """One tensor's next theta, from the equations of `rules.moment_gates`."""
    moments, averages, u, relative, z = read_tensor(theta, g, old, progress, num_steps)
    _, fast, middle, slow = averages
    squash = lambda x: np.clip(x, -2, 2)  # noqa: E731
    hidden = np.tanh(rule.hidden[0] @ z + rule.hidden[1])
    out = rule.output[0] @ hidden + rule.output[1]
    step = np.exp(np.clip(out[0] + rule.step @ z, -15, -1))
    x = np.stack(
        [
            np.log(u / rms(u)),
            squash(abs(middle / u)),
            squash(g * fast / u**2),
            squash(fast * slow / u**2),
            squash(relative**2),
            squash(relative * fast / u),
        ]
    )
    input_gate = sigmoid(np.tensordot(out[5:11], x, 1) + out[11])
    forget_gate = 1 - step * sigmoid(np.tensordot(out[12:18], x, 1) + out[18])
    move = input_gate * np.tensordot(out[1:5], averages, 1)
    move = np.clip(move / rms(move), -10, 10)
    return forget_gate * theta - step * move, moments


class MomentLstm(NamedTuple):
    lstm: Lstm
    tensor: Array  # [4 H, 16]
    output: Array  # [H]
    shortcut: Array  # [4]
    step: tuple[Array, float]  # [16], bias


def moment_lstm_step(
    rule: MomentLstm,
    theta: Array,
    g: Array,
    old: tuple[Moments, Array, Array],
    progress: float | None,
    num_steps: int | None,
) -> tuple[Array, tuple[Moments, Array, Array]]:
    """One tensor's next theta, from the equations of `rules.moment_lstm`."""
    moments, h, cell = old
    moments, averages, u, relative, z = read_tensor(
        theta, g, moments, progress, num_steps
    )
    y = np.stack([*(averages / u), relative, np.log(u / rms(u))])
    lstm = rule.lstm._replace(bias=rule.lstm.bias + rule.tensor @ z)
    h, cell = lstm.step(y.reshape(6, -1).T, h, cell)
    direction = np.tensordot(rule.shortcut, averages / u, 1)
    direction = direction + (h @ rule.output).reshape(theta.shape)
    step = np.exp(np.clip(rule.step[0] @ z + rule.step[1], -15, -1))
    move = np.clip(direction / rms(direction), -10, 10)
    return theta - step * move, (moments, h, cell)
