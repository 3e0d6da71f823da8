"""Curves of meta-training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalstm.plots.style import (
    COLOURS,
    add_grid_and_legend,
    add_note,
    interval,
    method_styles,
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
    styles = method_styles(methods)
    for method, seeds in loss.items():
        style = styles[method] | {"label": method, "markevery": 0.2}
        _draw_seeds(left, _smoothed(seeds), style)
    for method, seeds in accuracy.items():
        style = styles[method] | {"marker": "", "alpha": 0.45}
        _draw_seeds(right, _smoothed(seeds), style, percent=True)
    for method, seeds in validation.items():
        style = styles[method] | {"label": f"{method}, validation"}
        _draw_seeds(right, seeds, style, percent=True)
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
    styles = method_styles(dict.fromkeys([*loss, *validation]))
    for name, curve in loss.items():
        style = styles[name] | {"label": name, "markevery": 0.2}
        _draw_seeds(left, _smoothed([curve]), style)
    for name, curve in validation.items():
        _draw_seeds(right, [curve], styles[name] | {"label": name})
    left.set(xlabel="meta-steps", ylabel="meta-loss")
    right.set(xlabel="meta-steps", ylabel="validation, mean log of the last loss")
    for axes in (left, right):
        add_grid_and_legend(axes, fontsize=8)
    add_note(figure, "band: 95% CI over validation problems")
    return figure


def _draw_seeds(
    axes: Any, seeds: Sequence[Curve], style: Mapping[str, Any], percent: bool = False
) -> None:
    """Draw the mean over seeds and the band of its 95% CI; accuracies in per cent."""
    seeds = [curve for curve in seeds if len(curve.episodes)]
    if not seeds:
        return
    episodes, mean, half = _over_seeds(seeds)
    scale, limits = (100, (0, 100)) if percent else (1, (-np.inf, np.inf))
    axes.plot(episodes, scale * mean, **style)
    if half is not None:
        low, high = interval(scale * mean, scale * np.asarray(half), *limits)
        alpha = 0.2 * style.get("alpha", 1.0)
        axes.fill_between(episodes, low, high, color=style["color"], alpha=alpha, lw=0)


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
