"""The papers' equations in numpy float64, and finite differences of them.

Written from the papers and their published descriptions, one coordinate a row, so that
they share neither code nor layout with the library. N coordinates, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Objective = Callable[[Array], tuple[float, Array]]  # theta -> loss, its gradient


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def central_difference(fn: Callable[[Array], float], at: Array, step: float) -> Array:
    """The gradient of ``fn`` by fourth-order central differences."""
    gradient = np.zeros_like(at)
    for k in range(at.size):
        direction = np.zeros_like(at)
        direction[k] = step
        near = fn(at + direction) - fn(at - direction)
        far = fn(at + 2 * direction) - fn(at - 2 * direction)
        gradient[k] = (8 * near - far) / (12 * step)
    return gradient


class TanhNet(NamedTuple):
    """in -> hidden tanh -> classes, softmax cross-entropy; theta is one flat vector.

    Its parts, in this order: b1 [hidden], b2 [classes], w1 [in, hidden],
    w2 [hidden, classes].
    """

    inputs: int = 3
    hidden: int = 4
    classes: int = 3

    def unpack(self, theta: Array) -> dict[str, Array]:
        shapes = {
            "b1": (self.hidden,),
            "b2": (self.classes,),
            "w1": (self.inputs, self.hidden),
            "w2": (self.hidden, self.classes),
        }
        parts, start = {}, 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            parts[name] = theta[start:stop].reshape(shape)
            start = stop
        assert start == theta.size
        return parts

    @property
    def size(self) -> int:
        return self.hidden * (1 + self.inputs + self.classes) + self.classes

    def objective(self, x: Array, y: Array) -> Objective:
        """Mean cross-entropy on x [N, in], y [N], with its gradient by hand."""

        def fn(theta: Array) -> tuple[float, Array]:
            p = self.unpack(theta)
            act = np.tanh(x @ p["w1"] + p["b1"])
            logits = act @ p["w2"] + p["b2"]
            logits = logits - logits.max(1, keepdims=True)
            log_norm = np.log(np.exp(logits).sum(1))
            rows = np.arange(len(y))
            loss = float(np.mean(log_norm - logits[rows, y]))
            error = np.exp(logits - log_norm[:, None])
            error[rows, y] -= 1
            error /= len(y)
            back = (error @ p["w2"].T) * (1 - act**2)
            parts = [back.sum(0), error.sum(0), x.T @ back, act.T @ error]
            return loss, np.concatenate([part.ravel() for part in parts])

        return fn


def log_sign(x: Array, p: float = 10.0) -> Array:
    """Andrychowicz et al. (2016), appendix A: [...] -> [..., 2]."""
    x = np.asarray(x, np.float64)
    out = np.stack([np.full_like(x, -1.0), np.exp(p) * x], axis=-1)
    large = np.abs(x) >= np.exp(-p)
    out[large] = np.stack([np.log(np.abs(x[large])) / p, np.sign(x[large])], axis=-1)
    return out


class Lstm(NamedTuple):
    """One LSTM cell, gates in the order of ``order`` along the first axis."""

    inputs: Array  # [4 H, features]
    recurrent: Array  # [4 H, H]
    bias: Array  # [4 H]
    order: str = "ifog"  # input, forget, output, candidate

    def step(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        """x [N, features], h and c [N, H] -> h and c."""
        z = x @ self.inputs.T + h @ self.recurrent.T + self.bias
        width = h.shape[1]
        part = {
            name: z[:, k * width : (k + 1) * width] for k, name in enumerate(self.order)
        }
        candidate = np.tanh(part["g"])
        c = sigmoid(part["f"]) * c + sigmoid(part["i"]) * candidate
        return sigmoid(part["o"]) * np.tanh(c), c


class Gate(NamedTuple):
    """weights . [h_t, theta_{t-1}, previous gate] + bias."""

    features: Array  # [H], or [4] without a first LSTM
    theta: float
    carry: float
    bias: float

    def logit(self, h: Array, theta: Array, previous: Array) -> Array:
        return (
            h @ self.features + self.theta * theta + self.carry * previous + self.bias
        )


class MetaLstm(NamedTuple):
    lstm: Lstm | None
    forget: Gate
    input: Gate


class Record(NamedTuple):
    """What one update read, before the scale of the gradient."""

    loss: float
    gradient: Array  # [N]


class Unroll(NamedTuple):
    thetas: Array  # [T, N] after each update
    forget: Array  # [T, N]
    input: Array  # [T, N]
    records: list[Record]


def unroll_meta_lstm(
    rule: MetaLstm,
    theta: Array,
    objective: Objective,
    num_steps: int,
    *,
    carried: str,
    gradient_scale: float = 1.0,
    held: Sequence[Record] | None = None,
    held_features: Sequence[Record] | None = None,
) -> Unroll:
    """Ravi & Larochelle (2017), equation 2 and section 3.2; all states start at zero.

    ``carried``: what a gate sees of its previous step, its "logit" (the authors' code)
    or its "value" (the paper). ``held``: losses and gradients to use instead of those
    at theta (the first-order assumption); ``held_features``: likewise for what the
    gates read, while the gradient that is added stays live.
    """
    num = theta.size
    width = 0 if rule.lstm is None else rule.lstm.recurrent.shape[1]
    h, c = np.zeros((num, width)), np.zeros((num, width))
    f_logit, i_logit = np.zeros(num), np.zeros(num)
    out: dict[str, list] = {"thetas": [], "forget": [], "input": [], "records": []}
    for t in range(num_steps):
        now = Record(*objective(theta)) if held is None else held[t]
        seen = now if held_features is None else held_features[t]
        gradient = gradient_scale * now.gradient
        features = np.concatenate(
            [
                np.tile(log_sign(seen.loss), (num, 1)),
                log_sign(gradient_scale * seen.gradient),
            ],
            axis=1,
        )
        if rule.lstm is not None:
            h, c = rule.lstm.step(features, h, c)
            features = h
        previous = (f_logit, i_logit)
        if carried == "value":
            previous = (sigmoid(f_logit), sigmoid(i_logit))
        f_logit = rule.forget.logit(features, theta, previous[0])
        i_logit = rule.input.logit(features, theta, previous[1])
        theta = sigmoid(f_logit) * theta - sigmoid(i_logit) * gradient
        out["thetas"].append(theta)
        out["forget"].append(sigmoid(f_logit))
        out["input"].append(sigmoid(i_logit))
        out["records"].append(now)
    arrays = [np.stack(out[name]) for name in ("thetas", "forget", "input")]
    return Unroll(*arrays, out["records"])
