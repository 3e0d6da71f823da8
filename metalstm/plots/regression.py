"""Functions of one input before and after adaptation, and the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalstm.plots.style import COLOURS, method_styles, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FittedTask", "function_fits", "seed_spread"]


class FittedTask(NamedTuple):
    """A task's support points, and its function on the grid."""

    x: np.ndarray  # [N]
    y: np.ndarray  # [N]
    curve: np.ndarray  # [G]


def function_fits(
    tasks: Sequence[FittedTask],
    grid: np.ndarray,
    functions: Mapping[str, np.ndarray],
    steps: Sequence[int],
) -> Figure:
    """Draw networks before and after adaptation, a row a task, a column a method.

    Args:
      grid: inputs [G].
      functions: per method its outputs after 0 .. T updates, [tasks, T + 1, G].
      steps: which updates to draw, the first in dots.
    """
    figure = new_figure((3.2 * len(functions), 2.1 * len(tasks)))
    size = len(tasks), len(functions)
    rows = figure.subplots(*size, sharex=True, sharey="row", squeeze=False)
    for index, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        for axes, found in zip(row, functions.values(), strict=True):
            axes.plot(grid, task.curve, color="grey", lw=4, alpha=0.35, label="task")
            for number, step in enumerate(steps):
                style: dict[str, Any] = {"lw": 1.4, "ls": "-" if number else ":"}
                style["label"] = _updates(step) if step else "before"
                axes.plot(grid, found[index, step], color=COLOURS[number - 1], **style)
            axes.plot(task.x, task.y, "k^", ms=5, label="support")
            axes.grid(alpha=0.3)
    for axes, name in zip(rows[0], functions, strict=True):
        axes.set_title(name, fontsize=10)
    rows[0][-1].legend(fontsize=7)
    return figure


def seed_spread(
    errors: Mapping[str, np.ndarray], steps: Sequence[int], *, ylabel: str
) -> Figure:
    """Draw the mean error of each seed, a panel a number of updates.

    Args:
      errors: per method [seeds, tasks, T + 1].
      steps: which updates to draw.
    """
    figure, styles = new_figure((3.6 * len(steps), 3.2)), method_styles(errors)
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        for index, (name, found) in enumerate(errors.items()):
            means, style = found[..., step].mean(1), styles[name]
            at = np.full(len(means), index)
            axes.plot(at, means, **style | {"linestyle": "", "alpha": 0.6})
            axes.hlines(means.mean(), index - 0.3, index + 0.3, color=style["color"])
        axes.set(yscale="log", title=_updates(step), xticks=range(len(errors)))
        axes.set_xticklabels(errors, rotation=45, ha="right", fontsize=8)
        axes.grid(alpha=0.3, which="both", axis="y")
    figure.axes[0].set_ylabel(ylabel)
    return figure


def _updates(number: int) -> str:
    return f"{number} update" + "s" * (number != 1)
