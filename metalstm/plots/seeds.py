"""Curves of several seeds: their mean, their band, their smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Curve", "draw_seeds", "smoothed"]


class Curve(NamedTuple):
    """One seed's values against meta-training episodes."""

    episodes: np.ndarray  # [S] ascending
    values: np.ndarray  # [S]
    ci95: np.ndarray | None = None  # [S] half-width, None when unknown


def draw_seeds(
    axes: Any,
    seeds: Sequence[Curve],
    *,
    colour: str,
    label: str | None = None,
    alpha: float = 1.0,
    scale: float = 1.0,
    marker: str = "",
    linestyle: str = "-",
) -> None:
    """Draw the mean over seeds, times ``scale``, and the band of its 95% CI."""
    seeds = [curve for curve in seeds if len(curve.episodes)]
    if not seeds:
        return
    episodes, mean, band = _over_seeds(seeds)
    mean = scale * mean
    style = {"marker": marker, "markersize": 3, "linewidth": 1.4, "alpha": alpha}
    style |= {"color": colour, "linestyle": linestyle}
    axes.plot(episodes, mean, label=label, **style)
    if band is not None:
        low, high = mean - scale * band, mean + scale * band
        axes.fill_between(episodes, low, high, color=colour, alpha=0.2 * alpha)


def _over_seeds(
    seeds: Sequence[Curve],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean over seeds at the first seed's episodes, and half the width of its CI."""
    episodes = np.asarray(seeds[0].episodes)
    if len(seeds) == 1:
        return episodes, np.asarray(seeds[0].values), seeds[0].ci95
    # seeds limited by time stop at different episodes: compare where all have been
    episodes = episodes[episodes <= min(curve.episodes[-1] for curve in seeds)]
    values = np.stack([np.interp(episodes, c.episodes, c.values) for c in seeds])
    half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(seeds))
    return episodes, values.mean(0), half


def smoothed(seeds: Sequence[Curve], points: int = 60) -> list[Curve]:
    """Average neighbours, so that some ``points`` remain of a noisy curve."""
    smooth = []
    for curve in seeds:
        width = max(1, len(curve.values) // points)
        kept = len(curve.values) // width * width
        blocks = [np.asarray(a)[:kept].reshape(-1, width).mean(1) for a in curve[:2]]
        smooth.append(Curve(*blocks))
    return smooth
