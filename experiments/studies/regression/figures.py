"""Figures of the sinusoid study. Each function returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstm import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def error_figure(errors: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Draw error against updates, a panel a number of points.

    ``errors``: per shot, per method [inits, tasks, T + 1]; the band is the 95% CI over
    tasks of a task's mean over initialisations.
    """
    panels = {}
    for shot, by_method in errors.items():
        panels[f"{shot} support points"] = {
            name: plots.Losses(np.arange(found.shape[-1]), found.mean(0))
            for name, found in by_method.items()
        }
    figure = plots.loss_panels(panels, learned=list(next(iter(errors.values()))))
    for axes in figure.axes:
        axes.set(xlabel="gradient steps on the new task", ylabel="mean squared error")
    return figure


def function_figure(
    tasks: Sequence[Mapping[str, np.ndarray]],
    grid: np.ndarray,
    functions: Mapping[str, np.ndarray],
    steps: Sequence[int],
) -> Figure:
    """Draw networks before and after adaptation, a row a task, a column a method.

    Args:
      tasks: each with its support points ``x`` and ``y`` and its ``curve`` on the grid.
      grid: [G].
      functions: per method [tasks, T + 1, G].
      steps: which updates to draw, the first as dots.
    """
    figure = _figure((3.2 * len(functions), 2.1 * len(tasks)))
    rows = figure.subplots(
        len(tasks), len(functions), sharex=True, sharey="row", squeeze=False
    )
    for row, task, index in zip(rows, tasks, range(len(tasks)), strict=True):
        for axes, (name, found) in zip(row, functions.items(), strict=True):
            axes.plot(grid, task["curve"], color="grey", lw=4, alpha=0.35, label="task")
            for number, step in enumerate(steps):
                label = _updates(step) if step else "before"
                style: dict[str, Any] = {"lw": 1.4, "ls": "-" if number else ":"}
                colour = _COLOURS[-1] if not number else _COLOURS[number - 1]
                axes.plot(grid, found[index, step], color=colour, label=label, **style)
            axes.plot(task["x"], task["y"], "k^", ms=5, label="support")
            if index == 0:
                axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.3)
    rows[0][-1].legend(fontsize=7)
    return figure


def spread_figure(
    errors: Mapping[str, np.ndarray], steps: Sequence[int], *, shot: int
) -> Figure:
    """Draw the mean error of each initialisation, a panel a number of updates.

    ``errors``: per method [inits, tasks, T + 1].
    """
    figure = _figure((3.6 * len(steps), 3.2))
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        for index, found in enumerate(errors.values()):
            means = found[..., step].mean(1)
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(np.full(len(means), index), means, "o", color=colour, alpha=0.6)
            axes.hlines(means.mean(), index - 0.3, index + 0.3, color=colour)
        axes.set(yscale="log", title=_updates(step), xticks=range(len(errors)))
        axes.set_xticklabels(errors, rotation=45, ha="right", fontsize=8)
        axes.grid(alpha=0.3, which="both", axis="y")
    figure.axes[0].set_ylabel(f"mean squared error, {shot} points")
    return figure


def _updates(number: int) -> str:
    return f"{number} update" + "s" * (number != 1)


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", dpi=100)
