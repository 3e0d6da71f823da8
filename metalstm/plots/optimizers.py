"""Losses of optimizers, sweeps over learning rates, and escapes from plateaus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metalstm.plots.style import (
    add_grid_and_legend,
    add_note,
    interval,
    method_styles,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Losses", "Sweep", "escape_curves", "loss_panels", "rate_sweeps"]

_SPACED = 0.15  # of the axes' diagonal between two markers of a line


class Losses(NamedTuple):
    """One optimizer's losses on many problems."""

    steps: np.ndarray  # [S] updates done
    values: np.ndarray  # [problems, S]; not finite where it diverged


class Sweep(NamedTuple):
    """The score of each learning rate of a grid."""

    rates: np.ndarray  # [R] ascending
    scores: np.ndarray  # [R] lower is better; infinite where it diverged


def loss_panels(
    panels: Mapping[str, Mapping[str, Losses]],
    *,
    geometric: Sequence[str] = (),
    learned: Sequence[str] = (),
    columns: int = 3,
    xlabel: str = "updates",
    ylabel: str = "loss",
    over: str = "problems",
) -> Figure:
    """Draw losses against updates, a panel a problem, a line a rule.

    The scale is logarithmic where no loss of the panel is negative.

    The band is the 95% CI ``over`` problems or tasks, if there are several. Where any
    of them has diverged there is no mean, and the line ends.

    Args:
      panels: per title, per optimizer its losses.
      geometric: titles of panels that show exp of the mean log-loss and its CI: on
        quadratics, whose losses differ by orders of magnitude, the mean is that of the
        worst few.
      learned: names to draw in thick lines, over thin ones for the others.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = 4.4 if len(panels) > 1 else 6.5
    figure = new_figure((width * columns, 0.72 * width * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    names = dict.fromkeys(name for drawn in panels.values() for name in drawn)
    styles = method_styles(names, learned=learned)
    shared = len(panels) > 1
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, drawn) in zip(grid.flat, panels.items(), strict=False):
        negative = any((one.values < 0).any() for one in drawn.values())
        # hand-designed optimizers first, so that a learned rule's line is above theirs
        for name in sorted(drawn, key=lambda name: name in learned):
            mean, low, high = _band(drawn[name].values, title in geometric)
            steps, style = drawn[name].steps, styles[name] | {"markevery": _SPACED}
            axes.plot(steps, mean, label=name, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
        kind = " (geometric mean)" if title in geometric else ""
        axes.set(
            xlabel=xlabel, ylabel=ylabel + kind, yscale="linear" if negative else "log"
        )
        axes.set_title(title, fontsize=10)
        if shared:
            axes.grid(alpha=0.3)
        else:
            add_grid_and_legend(axes)
    if shared:  # in each panel it would hide the lines
        labelled = [axes.get_legend_handles_labels() for axes in grid.flat]
        lines = {n: line for one in labelled for line, n in zip(*one, strict=True)}
        figure.legend(
            lines.values(),
            lines.keys(),
            fontsize=8,
            loc="outside upper center",
            ncols=8,
        )
    if any(len(one.values) > 1 for drawn in panels.values() for one in drawn.values()):
        add_note(figure, f"band: 95% CI over {over}")
    return figure


def rate_sweeps(
    sweeps: Mapping[str, Sweep], *, ylabel: str = "last loss", log: bool = True
) -> Figure:
    """Draw the score of each learning rate of a grid, the best of each line marked.

    Args:
      sweeps: per optimizer its grid; where it diverged there is no point.
      log: a log scale, for scores above zero.
    """
    figure = new_figure((6.5, 4.4))
    axes = figure.subplots()
    styles = method_styles(sweeps)
    for name, (rates, scores) in sweeps.items():
        rates, scores = np.asarray(rates), np.asarray(scores, float)
        shown = np.where(np.isfinite(scores), scores, np.nan)
        axes.plot(rates, shown, label=name, **styles[name])
        if np.isfinite(shown).any():
            best = int(np.nanargmin(shown))
            axes.plot(rates[best], shown[best], **styles[name] | {"markersize": 9})
    axes.set(xlabel="learning rate", ylabel=ylabel, xscale="log")
    if log:
        axes.set_yscale("log")
    add_grid_and_legend(axes)
    return figure


def escape_curves(
    escaped: Mapping[str, tuple[np.ndarray, np.ndarray]],
    forget: Mapping[str, np.ndarray] | None = None,
    *,
    learned: Sequence[str] = (),
) -> Figure:
    """Draw the share of problems that have left a plateau, and the forget gates.

    Args:
      escaped: per optimizer the updates [S] and the share [S] in [0, 1].
      forget: per rule f, [problems, T, N]; a line for its median, a band for the
        middle 80% of problems and coordinates. None: no second panel.
    """
    figure = new_figure((10 if forget else 6.5, 4))
    left, *right = figure.subplots(1, 2 if forget else 1, squeeze=False)[0]
    styles = method_styles(escaped, learned=learned)
    for name, (steps, share) in escaped.items():
        style = styles[name] | {"markevery": _SPACED}
        left.plot(steps, 100 * np.asarray(share), label=name, **style)
    left.set(xlabel="updates", ylabel="escaped, % of problems", ylim=(-3, 103))
    for axes in right:
        for name, values in (forget or {}).items():
            style = styles[name] | {"markevery": _SPACED}
            steps = np.arange(1, values.shape[1] + 1)
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=(0, 2))
            axes.plot(steps, middle, label=name, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
        axes.set(xlabel="updates", ylabel="forget gate, median (band: middle 80%)")
    for axes in (left, *right):
        add_grid_and_legend(axes)
    return figure


def _band(
    values: np.ndarray, geometric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and the ends of its 95% CI, [S] each; nan where a problem has diverged."""
    values = np.asarray(values, np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    if geometric:
        values = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    mean = values.mean(0)
    half = np.zeros_like(mean)
    if len(values) > 1:
        half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
    if geometric:
        return np.exp(mean), np.exp(mean - half), np.exp(mean + half)
    # a log scale has no place for an interval that reaches zero
    lowest = -np.inf if (mean < 0).any() else 1e-3 * np.abs(mean)
    return mean, *interval(mean, half, lowest=lowest)
