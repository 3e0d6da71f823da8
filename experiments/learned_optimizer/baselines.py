"""Hand-made optimizers from optax, each with the grid that its rate is tuned over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax

GRID_POINTS = 16
BETAS = (0.5, 0.8, 0.9, 0.95, 0.99)


class Baseline(NamedTuple):
    """An optimizer whose rate, and perhaps momentum, is tuned."""

    factory: Callable[..., optax.GradientTransformation]  # (learning_rate[, momentum])
    first_exponent: float  # the grid starts at 10 to this
    betas: tuple[float, ...] = ()

    def grid(self) -> np.ndarray:
        """Rates four to a decade, [GRID_POINTS] ascending."""
        return 10 ** (self.first_exponent + np.arange(GRID_POINTS) / 4)


def baseline(name: str, steps: int) -> Baseline:
    """One of `experiments.learned_optimizer.options.BASELINES` or ``adam-cosine``.

    Args:
      steps: over which ``adam-cosine`` has its rate decay to 0.
    """

    def cosine(learning_rate):
        return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    nesterov = functools.partial(optax.sgd, nesterov=True)
    return {
        "sgd": Baseline(optax.sgd, -2.75),
        "momentum": Baseline(optax.sgd, -3.25, BETAS),
        "nesterov": Baseline(nesterov, -3.25, BETAS),
        "rmsprop": Baseline(optax.rmsprop, -3.5),
        "adam": Baseline(optax.adam, -3.0),
        "adamw": Baseline(optax.adamw, -3.0),
        "adagrad": Baseline(optax.adagrad, -2.5),
        "adadelta": Baseline(optax.adadelta, -1.0),
        "adam-cosine": Baseline(cosine, -3.0),
    }[name]
