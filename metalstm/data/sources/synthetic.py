"""Tasks drawn from a key alone: sinusoid regression and Gaussian clusters.

They follow the `Sampler` protocol of `metalstm.data.episodes`: ``spec.sample(key)``,
and ignore the pool, so that trainer and evaluator treat them as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from metalstm.base import Array, Batch, Episode
from metalstm.checks import check_at_least

__all__ = ["ClusterSpec", "SinusoidSpec"]


@dataclass(frozen=True)
class SinusoidSpec:
    """y = amplitude * sin(x - phase), the regression tasks of MAML (Finn et al., 2017).

    amplitude ~ U(0.1, 5), phase ~ U(0, pi), x ~ U(-5, 5). One task has ``shot`` support
    and ``queries`` query points: x float32 [N, 1], y float32 [N, 1].
    """

    shot: int
    queries: int = 100
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    domain: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        for name in ("shot", "queries"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("amplitude", "phase", "domain"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={(low, high)}: give (low, high), low first")

    @property
    def regression(self) -> bool:
        return True

    def curve(self, key: Array, x: Array) -> Array:
        """The function whose points ``sample(key)`` draws, at x."""
        amplitude_key, phase_key, *_ = jax.random.split(key, 4)
        amplitude = _uniform(amplitude_key, self.amplitude)
        return amplitude * jnp.sin(x - _uniform(phase_key, self.phase))

    def sample(self, key: Array, pool: Any = None) -> Episode:
        """Draw one task; ``pool`` is ignored."""
        del pool
        _, _, support_key, query_key = jax.random.split(key, 4)

        def draw(points_key: Array, num: int) -> Batch:
            x = _uniform(points_key, self.domain, (num, 1))
            return Batch(x, self.curve(key, x))

        return Episode(draw(support_key, self.shot), draw(query_key, self.queries))


@dataclass(frozen=True)
class ClusterSpec:
    """Few-shot classification of points around Gaussian centres; nothing to load.

    A task's class centres are ``spread`` * N(0, I) in ``dim`` dimensions, its points
    lie around them with a standard deviation of 1: x float32 [N, dim], y int32 [N], in
    shuffled order. Small ``spread`` is hard; at 5 classes in 2 dimensions, a spread of
    3 puts the best possible accuracy near 80%.
    """

    way: int
    shot: int
    queries: int = 15
    dim: int = 2
    spread: float = 3.0

    def __post_init__(self) -> None:
        for name in ("way", "shot", "queries", "dim"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def regression(self) -> bool:
        return False

    def sample(self, key: Array, pool: Any = None) -> Episode:
        """Draw one task; ``pool`` is ignored."""
        del pool
        centre_key, support_key, query_key = jax.random.split(key, 3)
        centres = self.spread * jax.random.normal(centre_key, (self.way, self.dim))

        def draw(key: Array, per_class: int) -> Batch:
            order_key, point_key = jax.random.split(key)
            labels = jnp.tile(jnp.arange(self.way, dtype=jnp.int32), per_class)
            y = jax.random.permutation(order_key, labels)
            noise = jax.random.normal(point_key, (len(y), self.dim))
            return Batch(centres[y] + noise, y)

        return Episode(draw(support_key, self.shot), draw(query_key, self.queries))


def _uniform(key: Array, limits: tuple[float, float], shape: tuple = ()) -> Array:
    return jax.random.uniform(key, shape, minval=limits[0], maxval=limits[1])
