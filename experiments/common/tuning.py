"""Choose hyper-parameters from a grid, with the best inside it where it may grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Tuned", "each_point", "tune"]

Grid = dict[str, np.ndarray]  # name -> values, ascending


class Tuned(NamedTuple):
    """The best point of a grid."""

    best: dict[str, float]
    score: float  # the lowest
    inside: dict[str, bool]  # per axis: whether the best is at neither end
    grid: Grid
    scores: np.ndarray  # an axis for each of the grid's

    def mark(self, name: str) -> str:
        """``*`` at the edge of the grid, for tables."""
        return "" if self.inside[name] else "*"


def tune(
    score: Callable[[Grid], np.ndarray],
    grid: Mapping[str, Sequence[float] | np.ndarray],
    *,
    grow: str | None = None,
    times: int = 4,
    points: int = 1,
) -> Tuned:
    """Score every point of ``grid``; the lowest is the best, the first of equals.

    Args:
      score: a grid -> scores, an axis for each of the grid's; what cannot be scored is
        infinite or NaN.
      grow: the axis, geometric, that grows while the best is at its end.
      times: how often it grows at most.
      points: by how many values each time.
    """
    axes = {name: np.asarray(values, np.float64) for name, values in grid.items()}
    scores = _finite(score(axes))
    for _ in range(times if grow else 0):
        assert grow is not None
        axis, values = list(axes).index(grow), axes[grow]
        best = np.unravel_index(np.argmin(scores), scores.shape)[axis]
        if 0 < best < len(values) - 1 or len(values) < 2:
            break
        at_start = best == 0
        ratio = values[0] / values[1] if at_start else values[-1] / values[-2]
        end = values[0] if at_start else values[-1]
        more = np.sort(end * ratio ** np.arange(1.0, points + 1))
        added = _finite(score(axes | {grow: more}))
        parts = [(more, added), (values, scores)][:: 1 if at_start else -1]
        axes[grow] = np.concatenate([part[0] for part in parts])
        scores = np.concatenate([part[1] for part in parts], axis)
    where = np.unravel_index(np.argmin(scores), scores.shape)
    at = dict(zip(axes, map(int, where), strict=True))
    return Tuned(
        best={name: float(axes[name][k]) for name, k in at.items()},
        score=float(scores[where]),
        inside={name: 0 < k < len(axes[name]) - 1 for name, k in at.items()},
        grid=axes,
        scores=scores,
    )


def each_point(score: Callable[..., float]) -> Callable[[Grid], np.ndarray]:
    """Score one point after another: ``score(name=value, ..)`` for each."""

    def over(grid: Grid) -> np.ndarray:
        shape = [len(values) for values in grid.values()]
        found = np.full(shape, math.inf)
        for at in np.ndindex(*shape):
            point: dict[str, Any] = {
                name: float(values[k])
                for (name, values), k in zip(grid.items(), at, strict=True)
            }
            found[at] = score(**point)
        return found

    return over


def _finite(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scores), np.inf, np.asarray(scores, np.float64))
