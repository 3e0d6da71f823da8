"""The one tuner: a geometric grid that grows until it brackets its best value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["bracketed_best"]

_MOST_EXTENSIONS = 4


def bracketed_best(
    grid: Sequence[float], score: Callable[[float], float]
) -> tuple[float, dict[float, float]]:
    """Return the value of the highest score, and every score by its value.

    The grid is extended geometrically while its best value is at an edge.
    """
    tried = {value: score(value) for value in grid}
    for _ in range(_MOST_EXTENSIONS):
        values = sorted(tried)
        best = max(values, key=lambda value: tried[value])
        if best == values[0]:
            further = values[0] ** 2 / values[1]
        elif best == values[-1]:
            further = values[-1] ** 2 / values[-2]
        else:
            break
        tried[further] = score(further)
    return max(tried, key=lambda value: tried[value]), tried
