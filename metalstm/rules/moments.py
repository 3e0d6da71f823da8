"""Gates that read normalised moments of the gradient: a rule for ordinary training.

Notation: a tensor of n coordinates; Z features of the tensor, F of a coordinate; H
hidden units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least
from metalstm.records import recorded
from metalstm.rules.flat import coordinate_dtype

__all__ = ["MomentGatesState", "moment_gates"]

_DECAYS = (0.9, 0.99, 0.999)  # of the averages of the gradient
_SQUARE_DECAY = 0.99  # of the average of its square
_NUM_TENSOR, _NUM_COORDINATE = 15, 6  # Z, F
_SIZE, _LEFT = 7, 14  # of Z: log of the tensor's size, log of what is left of training
_LARGEST = 10.0  # of a coordinate's normalised update
_LOG_STEPS = (-15.0, -1.0)
_TINY = 1e-30  # added to squares: a tensor whose gradient is zero does not move


class MomentGatesState(NamedTuple):
    """Four floats a parameter, each tree like the parameters, in float32."""

    step: Array  # int32, updates done
    means: tuple[PyTree, PyTree, PyTree]  # with the decays 0.9, 0.99, 0.999
    square: PyTree


@recorded("rule")
def moment_gates(*, hidden_size: int = 8) -> UpdateRule:
    r"""Gate a mixture of momenta, by features without units.

    .. math::
        m &= c_0 g + \textstyle\sum_k c_k \hat m_k, \qquad
        i = \sigma(w_i \cdot x + b_i), \qquad f = 1 - s \, \sigma(w_f \cdot x + b_f) \\
        \theta_t &= f \theta_{t-1} - s \, \frac{i m}{\mathrm{rms}(i m)}

    with averages :math:`\hat m_k` of the gradient g (decays 0.9, 0.99, 0.999, each
    divided by the weights it has so far) and the root u of its average square. The rms
    is over the tensor; a coordinate of the fraction is at most 10 in magnitude and s is
    at most e^-1, so updates are bounded. The features x [F] of a coordinate are log u
    relative to the tensor's, how consistent its momenta are, and its parameter's size.
    Step s, mixture c, weights and biases are the outputs of one layer of H tanh units
    that reads the tensor: the signal in its momenta relative to u, their angles, its
    size and shape, and the training's progress (`with_progress`), if known; log s is
    also linear in these.

    A fresh rule is Adam with each tensor's update of one length, which decays linearly
    where progress is known: with w_i = -1 for log u, i m is m / u. It reads no loss. A
    gradient that is not finite changes nothing, neither parameters nor state. The rate
    and weight decay of one's own go around it::

        tx = optax.chain(rule.bind(params), optax.scale_by_schedule(schedule))

    Args:
      hidden_size: H.

    Raises:
      ValueError: ``hidden_size`` is below 1; from ``update``, no parameters are given.
    """
    check_at_least("hidden_size", hidden_size, 1)

    def init(key: Array, params: PyTree) -> PyTree:
        del params
        shape = (hidden_size, _NUM_TENSOR)
        kernel = jax.random.normal(key, shape, jnp.float32) / _NUM_TENSOR**0.5
        bias = jnp.asarray(_start(), jnp.float32)
        return {
            "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden_size)},
            "output": {"kernel": jnp.zeros((len(bias), hidden_size)), "bias": bias},
            # s: the fourth root of size, times what is left of training
            "step": {
                "kernel": jnp.zeros(_NUM_TENSOR).at[_SIZE].set(1.25).at[_LEFT].set(3.0)
            },
        }

    def bind(rule: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _wide(p)), params)
            return MomentGatesState(jnp.int32(0), (zeros,) * 3, zeros)

        def update_fn(updates, state, params=None, *, progress=-1.0, **extra):
            del extra
            if params is None:
                raise ValueError(
                    "moment_gates needs the parameters: tx.update(grads, state, params)"
                )
            leaves, treedef = jax.tree.flatten(updates)
            grads = [jnp.asarray(g, _wide(g)) for g in leaves]
            finite = jnp.isfinite(sum(jnp.square(g).sum() for g in grads))
            step = state.step + finite
            # numbers that leave all as it was, where a select would copy every array
            decays = [jnp.where(finite, b, 1) for b in (*_DECAYS, _SQUARE_DECAY)]
            columns = (*state.means, state.square, params)
            moves, moments = [], []
            rows = zip(*map(jax.tree.leaves, columns), strict=True)
            for g, (*old, theta) in zip(grads, rows, strict=True):
                g = jnp.where(finite, g, 0)
                new = _moments(g, old, decays)
                moves.append(finite * _delta(rule, g, new, theta, step, progress))
                moments.append(new)
            moves = [d.astype(g.dtype) for d, g in zip(moves, leaves, strict=True)]
            *means, square = (
                jax.tree.unflatten(treedef, [m[k] for m in moments]) for k in range(4)
            )
            new_state = MomentGatesState(step, tuple(means), square)
            return jax.tree.unflatten(treedef, moves), new_state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = RuleTraits(coordinatewise=False, smooth=True, reads_loss=False)
    return UpdateRule(init, bind, traits)


def _start() -> list[float]:
    """The output's biases: log s; c; w_i, b_i; w_f, b_f."""
    rest = [0.0] * (_NUM_COORDINATE - 1)
    return [-5.1, 0.1, 0.9, 0.0, 0.0, -1.0, *rest, -4.0, 0.0, *rest, -6.0]


def _wide(x) -> jnp.dtype:
    return coordinate_dtype([x])


def _mean(x: Array) -> Array:
    return x.sum() / max(x.size, 1)


def _rms(x: Array) -> Array:
    return jnp.sqrt(_mean(jnp.square(x)) + _TINY)


def _moments(g: Array, old: list[Array], decays: list[Array]) -> list[Array]:
    added = (g, g, g, jnp.square(g))
    rows = zip(decays, old, added, strict=True)
    return [(b * m + (1 - b) * x).astype(g.dtype) for b, m, x in rows]


def _delta(
    rule: PyTree, g: Array, moments: list[Array], theta: Array, count: Array, progress
) -> Array:
    """The change of one tensor."""
    steps = jnp.maximum(count, 1).astype(g.dtype)
    theta = theta.astype(g.dtype)
    *means, square = moments
    # each average over the weights it has so far; numbers, so that no array is made
    *scales, square_scale = (
        1 / (1 - jnp.power(b, steps)) for b in (*_DECAYS, _SQUARE_DECAY)
    )
    mean_square = square_scale * _mean(square)
    # coordinates that have never had a gradient: 1e-6 of the others' u, not 0
    square = square_scale * square + (1e-12 * mean_square + _TINY)
    unit, size = jnp.sqrt(mean_square + _TINY), _rms(theta)
    scales = [jnp.ones((), g.dtype), *scales]
    averages = [g, *means]
    z = _tensor_features(averages, scales, theta, unit, size, steps, progress)
    rule = jax.tree.map(lambda w: jnp.asarray(w, g.dtype), rule)
    hidden = jnp.tanh(rule["hidden"]["kernel"] @ z + rule["hidden"]["bias"])
    out = rule["output"]["kernel"] @ hidden + rule["output"]["bias"]
    step = jnp.exp(jnp.clip(out[0] + rule["step"]["kernel"] @ z, *_LOG_STEPS))
    mixture = zip(out[1:5], scales, averages, strict=True)
    mixed = sum(c * scale * m for c, scale, m in mixture)
    x = _coordinate_features(averages, scales, theta * (1 / size), square, unit)

    def gate(weights: Array) -> Array:
        terms = zip(weights[:-1], x, strict=True)
        return jax.nn.sigmoid(sum((w * feature for w, feature in terms), weights[-1]))

    of_input, of_forget = jnp.split(out[5:], 2)
    move = gate(of_input) * mixed
    move = jnp.clip(move * (1 / _rms(move)), -_LARGEST, _LARGEST)
    return -step * (move + gate(of_forget) * theta)


def _tensor_features(
    averages: list[Array],
    scales: list[Array],
    theta: Array,
    unit: Array,
    size: Array,
    steps: Array,
    progress,
) -> Array:
    """What the step, the mixture and the gates' weights are read from, [Z]."""
    fan_in = math.prod(theta.shape[:-1]) if theta.ndim > 1 else 1
    known = progress >= 0
    done = jnp.where(known, progress, 0)
    g, fast, _, slow = averages
    lengths = [_rms(m) for m in averages]
    # one root after the other: their product may underflow, and its derivative
    cosine = lambda a, b, *sizes: _mean(a * b) / sizes[0] / sizes[1]  # noqa: E731
    relative = zip(lengths, scales, strict=True)
    features = [
        *(jnp.log(scale * length / unit) / 3 for length, scale in relative),
        cosine(g, fast, lengths[0], lengths[1]),
        cosine(fast, slow, lengths[1], lengths[3]),
        cosine(fast, theta, lengths[1], size),
        jnp.log(size + 1e-3) / 5,
        math.log(max(theta.size, 1)) / 10,
        math.log(max(fan_in, 1)) / 10,
        float(theta.ndim > 1),
        jnp.log(steps) / 10,
        done,
        known,
        jnp.log(1.01 - done) / 3,
    ]
    return jnp.stack([jnp.asarray(feature, g.dtype) for feature in features])


def _coordinate_features(
    averages: list[Array],
    scales: list[Array],
    relative: Array,
    square: Array,
    unit: Array,
) -> list[Array]:
    """What the gates read: F arrays, the same when g and theta change their signs."""
    # no division of arrays: they cost as much as all the rest
    inverse = 1 / jnp.sqrt(square)  # rsqrt's derivative overflows where it is _TINY
    bounded = lambda a: jnp.clip(a, -2, 2)  # noqa: E731
    current, fast, middle, slow = (
        m * (scale * inverse) for m, scale in zip(averages, scales, strict=True)
    )
    return [
        -jnp.log(inverse * unit),
        bounded(jnp.abs(middle)),
        bounded(current * fast),
        bounded(fast * slow),
        bounded(jnp.square(relative)),
        bounded(relative * fast),
    ]
