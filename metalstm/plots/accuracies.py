"""Accuracy of many methods: bars, against shots and ways, and of verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metalstm.plots.style import (
    DASHES,
    interval,
    known_colour,
    method_styles,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_bars", "accuracy_sweep", "roc_curves"]

# A scale of odds has no place for 0 and 1.
_LIMITS = (0.0005, 0.9995)
_ODDS_TICKS = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995,
    0.998, 0.999,
)  # fmt: skip


def accuracy_bars(
    accuracies: Mapping[str, tuple[float, float]],
    *,
    chance: float | None = None,
    title: str = "",
) -> Figure:
    """Draw accuracy and its 95% CI, per method ``(mean, half-width)`` in [0, 1].

    The library's methods have their colours, and bars of any other name are grey.
    """
    figure = new_figure((6.5, 0.9 + 0.42 * len(accuracies)))
    axes = figure.subplots()
    names = list(accuracies)
    means = 100 * np.array([accuracies[n][0] for n in names])
    errors = 100 * np.array([accuracies[n][1] for n in names])
    low, high = interval(means, errors, 0, 100)
    rows = range(len(names))
    colours = [known_colour(name) or "0.6" for name in names]
    reach = [means - low, high - means]
    axes.barh(rows, means, xerr=reach, color=colours, alpha=0.85, capsize=3)
    for row, mean, error, end in zip(rows, means, errors, high, strict=True):
        axes.text(end + 1, row, f"{mean:.1f} ± {error:.1f}", va="center")
    xlabel = "accuracy, % ± 95% CI"
    if chance is not None:
        axes.axvline(100 * chance, color="grey", linestyle=":")
        xlabel += " (dotted: chance)"
    axes.set(yticks=rows, yticklabels=names, xlabel=xlabel, title=title)
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    return figure


def accuracy_sweep(
    sweeps: Mapping[str, Sequence[tuple[float, float, float]]],
    families: Mapping[str, str],
    *,
    xlabel: str,
    title: str = "",
    chance: Sequence[tuple[float, float]] = (),
    bold: Sequence[str] = (),
    xscale: Literal["log", "linear"] = "log",
) -> Figure:
    """Draw accuracy against shots or ways, a line a method, its name at its end.

    The band is the 95% CI. Where most is above 90%, the scale is that of the odds:
    from 98 to 99 is as far as from 50 to 67.

    Args:
      sweeps: per method ``(x, mean, half-width)``, ascending in x, in [0, 1].
      families: per method what it belongs to; a family has one style of line.
      chance: points ``(x, accuracy)`` of a dotted line.
      bold: names to draw in thick lines.
    """
    figure = new_figure((8.6, max(4.6, 1.6 + 0.16 * len(sweeps))))
    axes = figure.subplots()
    means = [[mean for _, mean, _ in points] for points in sweeps.values()]
    odds = bool(np.median([line[-1] for line in means]) > 0.9)
    limits = _LIMITS if odds else (0.0, 1.0)
    order = list(dict.fromkeys(families[name] for name in sweeps))
    xs = sorted({x for points in sweeps.values() for x, _, _ in points})
    styles = method_styles(sweeps, learned=bold)
    colours = {name: style["color"] for name, style in styles.items()}
    for name, points in sweeps.items():
        family = DASHES[order.index(families[name]) % len(DASHES)]
        own = {"linestyle": family, "zorder": 3 if name in bold else 2, "label": name}
        x, mean, half = np.array(points, float).T
        low, high = interval(mean, half, *limits)
        axes.plot(x, np.clip(mean, *limits), **styles[name] | own)
        # many bands on top of each other hide the lines
        alpha = 0.15 if name in bold or len(sweeps) <= 8 else 0.05
        axes.fill_between(x, low, high, color=colours[name], alpha=alpha, lw=0)
    if chance:
        x, level = np.array(chance, float).T
        axes.plot(x, level, color="grey", linestyle=(0, (1, 2)), linewidth=1.6)
        axes.annotate("chance", (x[0], level[0]), (2, 3), textcoords="offset points")
    _accuracy_scale(axes, max(map(max, means)), odds)
    # lines end at the right edge, where their names are
    axes.set(xscale=xscale, xlim=(0.94 * xs[0], xs[-1] * 1.02))
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="accuracy, % (band: 95% CI)", title=title)
    axes.grid(alpha=0.3)
    _name_ends(axes, sweeps, colours, bold)
    _family_legend(figure, order)
    return figure


def roc_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Draw true accepts against false accepts, the latter on a log scale.

    A line's marker is where both errors are equally frequent.

    Args:
      curves: per method, false and true accepts [K] in [0, 1], both rising, as
        `metalstm.verification.Verification` has them.
    """
    figure = new_figure((6.5, 4.8))
    axes = figure.subplots()
    smallest = min(false[false > 0].min() for false, _ in curves.values())
    left = min(smallest, 1e-2)
    styles = method_styles(curves)
    for name, (false, true) in curves.items():
        style = styles[name] | {"linewidth": 1.6}
        shown = np.maximum(false, left)  # none has no place on a log scale
        line = style | {"marker": "", "drawstyle": "steps-post", "label": name}
        axes.plot(shown, 100 * true, **line)
        equal = int(np.argmax(false >= 1 - true))
        axes.plot(shown[equal], 100 * true[equal], **style | {"markersize": 6})
    even = np.geomspace(left, 1)
    axes.plot(even, 100 * even, color="grey", linestyle=":", label="chance")
    about = "false accepts (marker: as frequent as false rejects)"
    axes.set(xlabel=about, ylabel="true accepts, %", title=title)
    axes.set(xscale="log", xlim=(left, 1), ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _accuracy_scale(axes: Any, best: float, odds: bool) -> None:
    """Per cent on a scale of odds, or a linear one, up to what shows the best mean."""
    lowest, highest = axes.dataLim.intervaly
    if odds:
        # a band may pass the best mean by far
        highest = min(highest, 1 - (1 - best) / 2, _LIMITS[1])
        axes.set_yscale("logit", nonpositive="clip")
        axes.set_yticks([t for t in _ODDS_TICKS if lowest <= t <= highest])
        axes.set_ylim(0.85 * lowest, 1 - 0.8 * (1 - highest))
    else:
        axes.set_ylim(lowest - 0.03, min(1, highest) + 0.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")


def _name_ends(
    axes: Any,
    sweeps: Mapping[str, Sequence[tuple[float, float, float]]],
    colours: Mapping[str, str],
    bold: Sequence[str],
    fontsize: float = 7.5,
) -> None:
    """Write names right of the axes near the ends of their lines, without overlap."""
    to_axes = axes.transAxes.inverted()
    ends = {
        name: to_axes.transform(
            axes.transData.transform((points[-1][0], np.clip(points[-1][1], *_LIMITS)))
        )
        for name, points in sweeps.items()
    }
    names = sorted(ends, key=lambda name: ends[name][1])
    height = 0.75 * 72 * axes.figure.get_size_inches()[1]
    gap = min(1.25 * fontsize / height, 1 / max(1, len(names) - 1))
    heights = _spread(np.array([ends[name][1] for name in names]), gap)
    for name, level in zip(names, heights, strict=True):
        axes.annotate(
            name,
            ends[name],
            (1.05, level),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=fontsize,
            color=colours[name],
            fontweight="bold" if name in bold else "normal",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colours[name],
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def _spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Return the nearest positions in [0, 1] that are ``gap`` apart (least squares).

    Where there is no room between 0 and 1, they go beyond 1.
    """
    blocks: list[tuple[float, int]] = []  # mean of value - k gap, number
    for k, value in enumerate(values):
        mean, count = value - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean = (before * number + mean * count) / (count + number)
            count += number
        blocks.append((mean, count))
    shifts = np.concatenate([np.full(count, mean) for mean, count in blocks])
    room = 1 - gap * (len(values) - 1)
    return np.clip(shifts, 0, max(0, room)) + gap * np.arange(len(values))


def _family_legend(figure: Figure, families: Sequence[str]) -> None:
    if len(families) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="black", linewidth=1.3, linestyle=DASHES[i % len(DASHES)])
        for i in range(len(families))
    ]
    figure.legend(
        handles,
        families,
        loc="outside lower center",
        ncols=min(3, len(families)),
        fontsize=8,
        handlelength=4,
        frameon=False,
    )
