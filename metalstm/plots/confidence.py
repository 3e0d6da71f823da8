"""How sure a method is, and whether it is right to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstm.plots.style import (
    add_grid_and_legend,
    interval,
    method_styles,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confidence_panels"]


_FEW = 100  # answers of a bin that is not drawn


def confidence_panels(
    asked: Sequence[float], methods: Mapping[str, Sequence[Any]]
) -> Figure:
    """Draw calibration, coverage against what was asked for, and misses.

    Args:
      asked: K coverages, of `meta.confidence.fit_confidence`.
      methods: by name, a `meta.confidence.ConfidenceReport` for each coverage, on
        held-out episodes.
    """
    figure = new_figure((9.6, 3.3))
    calibrated, covered, missed = figure.subplots(1, 3)
    styles = method_styles(methods)
    for name, reports in methods.items():
        style = styles[name] | {"label": name}
        bins = reports[0].reliability
        enough = bins.counts >= _FEW
        calibrated.plot(
            100 * bins.confidence[enough], 100 * bins.accuracy[enough], **style
        )
        levels = 100 * np.asarray(asked)
        mean, ci95 = 100 * np.array([report.coverage for report in reports]).T
        covered.plot(levels, mean, **style)
        low, high = interval(mean, ci95, 0, 100)
        covered.fill_between(levels, low, high, color=style["color"], alpha=0.2, lw=0)
        missed.plot(
            [100 * report.false_alarms[0] for report in reports],
            [100 * report.misses[0] for report in reports],
            **style,
        )
    for axes, (x, y) in (
        (calibrated, ("probability of the answer, %", "right answers, %")),
        (covered, ("coverage asked for, %", "labels in their sets, %")),
    ):
        ends = [max(ends[0] for ends in (axes.get_xlim(), axes.get_ylim())), 100]
        axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
        axes.set(xlabel=x, ylabel=y)
    missed.set(
        xlabel="known classes refused, %",
        ylabel="unknown classes given a label, %",
        xscale="log",
        ylim=(0, None),
    )
    missed.xaxis.set_major_formatter("{x:g}")
    for axes in (calibrated, covered, missed):
        add_grid_and_legend(axes)
    return figure
