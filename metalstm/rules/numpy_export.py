"""A trained rule as one file of plain Python that needs numpy or torch, and no JAX."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from metalstm.base import PyTree
from metalstm.rules.io import SavedRule
from metalstm.runtime.files import atomic_write

__all__ = ["export_numpy"]


def export_numpy(saved: SavedRule, path: str | Path) -> Path:
    """Write a trained `moment_gates` as a Python file for numpy or torch.

    The file has the weights and two functions, ``init(params)`` and ``update(grads,
    state, params, progress=None, num_steps=None)``, of lists of float arrays::

        rules.export_numpy(metalstm.load_rule("gates-v1"), "my_rule.py")

    Raises:
      ValueError: it is another kind of rule, or has options but its size.
    """
    spec = saved.spec
    standard = not spec.get("orthogonal") and spec.get("normalise", True)
    if spec.get("rule") != "moment_gates" or not standard:
        raise ValueError(
            f"spec={spec}: only moment_gates can be exported, of no option but "
            "hidden_size"
        )
    path = Path(path)
    layers = (
        ("hidden", "kernel"),
        ("hidden", "bias"),
        ("output", "kernel"),
        ("output", "bias"),
        ("step", "kernel"),
    )
    weights = (
        f"{layer}_{part}".upper() + " = " + _literal(saved.params[layer][part])
        for layer, part in layers
    )
    text = _FILE.replace("WEIGHTS", "\n".join(weights))
    # a literal: what a rule's file says of itself must not end up as code
    trained_on = ascii(str(saved.info.get("trained_on", "not stated")))
    with atomic_write(path) as part:
        part.write_text(text.replace("ABOUT", trained_on))
    return path


def _literal(weights: PyTree) -> str:
    """A list of numbers, or of rows, that have all digits of a float32."""
    weights = np.asarray(weights, np.float32)
    if weights.ndim == 1:
        return "[" + ", ".join(map(str, weights)) + "]"
    rows = (f"    {_literal(row)}," for row in weights)
    return "\n".join(["[", *rows, "]"])


_FILE = '''"""A learned optimizer in plain Python: numpy or torch arrays, no JAX.

Written by metalstm.rules.export_numpy; TRAINED_ON says on what it was trained.

    state = init(params)  # a list of float arrays, on any device
    for step in range(num_steps):
        updates, state = update(grads, state, params, step / num_steps, num_steps)
        params = [p + u for p, u in zip(params, updates)]

``progress`` is the share of training that is done, 1 past its end, ``num_steps`` its
length; None where they are not known. Half precision is computed in float32. In torch,
work under torch.no_grad() and add with p.add_(u).
"""

import math
import sys

TRAINED_ON = ABOUT
WEIGHTS

DECAYS = (0.9, 0.99, 0.999)


def init(params):
    return {"step": 0, "moments": [[0 * _wide(p) for _ in range(4)] for p in params]}


def update(grads, state, params, progress=None, num_steps=None):
    """Return what to add to each array, and the state; NaN does nothing."""
    wide = [_wide(g) for g in grads]
    if not math.isfinite(sum(float((g * g).sum()) for g in wide)):
        return [0 * p for p in params], state
    time = state["step"] + 1, progress, num_steps
    updates, moments = [], []
    for g, old, theta in zip(wide, state["moments"], params):
        new = [b * m + (1 - b) * g for b, m in zip(DECAYS, old)]
        new.append(0.99 * old[3] + 0.01 * g * g)
        updates.append(_as_narrow(_move(g, new, _wide(theta), time), theta))
        moments.append(new)
    return updates, {"step": time[0], "moments": moments}


def _move(g, moments, theta, time):
    step = time[0]
    xp = sys.modules[type(theta).__module__.split(".")[0]]  # numpy or torch
    averages = [g, *(m / (1 - b**step) for m, b in zip(moments, DECAYS))]
    square = moments[3] / (1 - 0.99**step)
    mean_square = _mean(square)
    square = square + (1e-12 * mean_square + 1e-30)
    unit, size = math.sqrt(mean_square + 1e-30), min(_rms(theta), 3.4e38)
    z = _features(averages, theta, unit, size, *time)
    hidden = [math.tanh(x) for x in _dense(HIDDEN_KERNEL, HIDDEN_BIAS, z)]
    out = _dense(OUTPUT_KERNEL, OUTPUT_BIAS, hidden)
    log_step = out[0] + sum(w * x for w, x in zip(STEP_KERNEL, z))
    length = math.exp(min(max(log_step, -15), -1))

    root = xp.sqrt(square)
    current, fast, middle, slow = (m / root for m in averages)
    relative = theta / size
    x = [
        xp.log(root / unit),
        xp.clip(abs(middle), -2, 2),
        xp.clip(current * fast, -2, 2),
        xp.clip(fast * slow, -2, 2),
        xp.clip(relative * relative, -2, 2),
        xp.clip(relative * fast, -2, 2),
    ]

    def gate(weights):
        total = sum(w * feature for w, feature in zip(weights, x)) + weights[-1]
        return 0.5 * (1 + xp.tanh(total / 2))

    move = gate(out[5:12]) * sum(c * m for c, m in zip(out[1:5], averages))
    move = xp.clip(move / _rms(move), -10, 10)
    return -length * (move + gate(out[12:]) * theta)


def _features(averages, theta, unit, size, step, progress, num_steps):
    g, fast, _, slow = averages
    lengths = [_rms(m) for m in averages]
    fan_in = math.prod(theta.shape[:-1]) if theta.ndim > 1 else 1
    done = 0.0 if progress is None else min(progress, 1.0)
    return [
        *(math.log(length / unit) / 3 for length in lengths),
        _mean(g * fast) / lengths[0] / lengths[1],
        _mean(fast * slow) / lengths[1] / lengths[3],
        _mean(fast * theta) / lengths[1] / size,
        math.log(size + 1e-3) / 3 + 1,
        math.log(max(math.prod(theta.shape), 1)) / 3 - 2,
        math.log(max(fan_in, 1)) / 3 - 1,
        float(theta.ndim > 1),
        math.log(step) / 3 - 2,
        done,
        float(progress is not None),
        math.log(1.01 - done) / 3,
        math.log((num_steps or 1000) / 1000) / 3,
    ]


def _dense(kernel, bias, x):
    return [b + sum(w * a for w, a in zip(row, x)) for row, b in zip(kernel, bias)]


def _wide(x):
    if x.dtype.itemsize > 2:
        return x
    return x.float() if hasattr(x, "float") else x.astype("float32")


def _as_narrow(x, like):
    cast = "to" if hasattr(x, "to") else "astype"
    return x if like.dtype.itemsize > 2 else getattr(x, cast)(like.dtype)


def _mean(x):
    return float(x.sum()) / max(math.prod(x.shape), 1)


def _rms(x):
    return math.sqrt(_mean(x * x) + 1e-30)
'''
