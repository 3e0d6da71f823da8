"""Learned optimizers in numpy float64, written from the papers' equations.

One coordinate a row, as in `reference`. N coordinates, H hidden units, T updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from reference import Array, Lstm, Objective, log_sign


class L2L(NamedTuple):
    layers: list[Lstm]
    weights: Array  # [H]
    bias: float
    scale: float
    p: float | None  # None: raw gradients


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
    for t in range(num_steps):
        loss, gradient = objective(theta)
        if held is not None:
            gradient = held[t]
        x = gradient[:, None] if rule.p is None else log_sign(gradient, rule.p)
        for k, layer in enumerate(rule.layers):
            states[k] = layer.step(x, *states[k])
            x = states[k][0]
        theta = theta + rule.scale * (x @ rule.weights + rule.bias)
        thetas.append(theta)
        losses.append(loss)
        gradients.append(gradient)
    return np.stack(thetas), np.array(losses), gradients
