"""What each value of some settings gives, next to the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstm.plots.style import COLOURS, add_note, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["setting_panels"]

_SMALL, _DEFAULT = COLOURS[0], COLOURS[1]


def setting_panels(
    panels: Mapping[str, Mapping[Any, np.ndarray]],
    *,
    default: Mapping[str, Any],
    chance: float | None = None,
    columns: int = 3,
) -> Figure:
    """Draw accuracy against the values of settings, a panel a setting.

    A white dot is a seed, a large one the mean over seeds; the default's is orange.

    Args:
      panels: per title, per value the accuracies [seeds] in [0, 1]. Values that are all
        numbers have a log scale and a line, others a place each.
      default: per title the value that is the default.
      chance: a dotted line at this accuracy.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure((0.6 + 3.0 * columns, 0.4 + 2.3 * rows))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, found) in zip(grid.flat, panels.items(), strict=False):
        numbers = all(isinstance(value, (int, float)) for value in found)
        x = np.array([*found] if numbers else range(len(found)), float)
        means = np.array([100 * np.mean(of_seeds) for of_seeds in found.values()])
        line = "-" if numbers else ""
        axes.plot(x, means, color=_SMALL, marker="o", markersize=6, linestyle=line)
        seeds: dict[str, Any] = {"linestyle": "", "zorder": 4, "marker": "o"}
        seeds |= {"markersize": 3.2, "color": "white", "markeredgecolor": "black"}
        for place, of_seeds in zip(x, found.values(), strict=True):
            at = np.full(np.size(of_seeds), place)
            axes.plot(at, 100 * np.asarray(of_seeds), **seeds)
        ours = list(found).index(default[title])
        axes.plot(x[ours], means[ours], "o", color=_DEFAULT, markersize=9)
        if chance is not None:
            axes.axhline(100 * chance, color="grey", linestyle=":")
        if numbers:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xlim(-0.5, len(found) - 0.5)
            axes.set_xticks(x, [str(value) for value in found])
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    for row in grid:
        row[0].set_ylabel("accuracy, %")
    add_note(
        figure,
        "white dot: a seed; large dot: their mean, of the default orange"
        + ("; dotted: chance" if chance is not None else ""),
    )
    return figure
