"""Curves of meta-training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalstm.plots.style import (
    COLOURS,
    add_grid_and_legend,
    add_note,
    line_style,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "learning_curves", "meta_training_curves"]


class Curve(NamedTuple):
    """One seed's values against meta-training episodes."""

    episodes: np.ndarray  # [S] ascending
    values: np.ndarray  # [S]
    ci95: np.ndarray | None = None  # [S] half-width, None when unknown


def learning_curves(
    loss: Mapping[str, Sequence[Curve]],
    accuracy: Mapping[str, Sequence[Curve]],
    validation: Mapping[str, Sequence[Curve]],
    *,
    title: str = "",
    chance: float | None = None,
    train_tasks: str = "meta-training tasks",
) -> Figure:
    """Draw loss and accuracy against episodes, one colour a method.

    Args:
      loss: per method one curve per seed, on meta-training episodes.
      accuracy: likewise, in [0, 1]; drawn pale.
      validation: likewise, on meta-validation episodes; drawn with markers. The band is
        the 95% CI over seeds, or with one seed that over episodes (``Curve.ci95``).
      chance: a dotted line at this accuracy.
      train_tasks: what ``loss`` and ``accuracy`` are of; say it where it differs from
        the validation, such as "20-way meta-training tasks".
    """
    methods = list(dict.fromkeys([*loss, *accuracy, *validation]))
    crowded = len(methods) > len(COLOURS)
    figure = new_figure((12.5, max(4, 1 + 0.15 * len(methods))) if crowded else (10, 4))
    left, right = figure.subplots(1, 2)
    styles = {}
    for index, method in enumerate(methods):
        style = line_style(index)
        styles[method] = {"colour": style["color"], "linestyle": style["linestyle"]}
    for method, seeds in loss.items():
        _draw_seeds(left, _smoothed(seeds), label=method, **styles[method])
    for method, seeds in accuracy.items():
        _draw_seeds(right, _smoothed(seeds), alpha=0.45, scale=100, **styles[method])
    for method, seeds in validation.items():
        label = f"{method}, validation"
        _draw_seeds(right, seeds, label=label, scale=100, marker="o", **styles[method])
    if chance is not None:
        right.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    left.set(xlabel="meta-training episodes", ylabel="query loss", title=title)
    right.set(xlabel="meta-training episodes", ylabel="query accuracy, %")
    num_seeds = max(map(len, validation.values()), default=1)
    over = "validation episodes" if num_seeds == 1 else f"{num_seeds} seeds"
    add_note(
        figure,
        f"loss and pale lines: {train_tasks}; marked lines: validation, with a band "
        f"for the 95% CI over {over}",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0] and not crowded:
            axes.legend(fontsize=8)
    if crowded:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def meta_training_curves(
    loss: Mapping[str, Curve], validation: Mapping[str, Curve]
) -> Figure:
    """Draw the meta-loss of rules, and their mean log-loss on other problems.

    Args:
      loss: per rule, against meta-steps (``Curve.episodes``).
      validation: likewise; the band is the CI over problems.
    """
    figure = new_figure((10, 4))
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys([*loss, *validation]))
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        if name in loss:
            _draw_seeds(left, _smoothed([loss[name]]), colour=colour, label=name)
        if name in validation:
            curve = [validation[name]]
            _draw_seeds(right, curve, colour=colour, label=name, marker="o")
    left.set(xlabel="meta-steps", ylabel="meta-loss")
    right.set(xlabel="meta-steps", ylabel="validation, mean log of the last loss")
    for axes in (left, right):
        add_grid_and_legend(axes, fontsize=8)
    add_note(figure, "band: 95% CI over validation problems")
    return figure


def _draw_seeds(
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


def _smoothed(seeds: Sequence[Curve], points: int = 60) -> list[Curve]:
    """Average neighbours, so that some ``points`` remain of a noisy curve."""
    smooth = []
    for curve in seeds:
        width = max(1, len(curve.values) // points)
        kept = len(curve.values) // width * width
        blocks = [np.asarray(a)[:kept].reshape(-1, width).mean(1) for a in curve[:2]]
        smooth.append(Curve(*blocks))
    return smooth
