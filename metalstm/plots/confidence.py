"""How sure a method is, and whether it is right to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metalstm.calibration import Reliability
from metalstm.plots.style import (
    COLOURS,
    DASHES,
    MARKERS,
    add_grid_and_legend,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConfidenceCurves", "confidence_panels"]


class ConfidenceCurves(NamedTuple):
    """Of one method on held-out episodes, at K promised rates; shares in [0, 1]."""

    reliability: Reliability
    promised: np.ndarray  # [K], coverage asked for
    coverage: np.ndarray  # [K, 2], measured: mean and half a 95% interval
    false_alarms: np.ndarray  # [K], measured
    misses: np.ndarray  # [K], at these false alarms


_FEW = 20  # answers of a bin that is not drawn


def confidence_panels(methods: Mapping[str, ConfidenceCurves]) -> Figure:
    """Draw calibration, coverage against what was promised, and misses.

    Args:
      methods: by name, in the order of the legend.
    """
    figure = new_figure((9.6, 3.3))
    calibrated, covered, missed = figure.subplots(1, 3)
    for index, (name, curves) in enumerate(methods.items()):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 3.5,
            "linewidth": 1.2,
            "label": name,
        }
        bins = curves.reliability
        enough = bins.counts >= _FEW
        calibrated.plot(
            100 * bins.confidence[enough], 100 * bins.accuracy[enough], **style
        )
        promised = 100 * curves.promised
        mean, ci95 = 100 * curves.coverage.T
        covered.plot(promised, mean, **style)
        covered.fill_between(
            promised, mean - ci95, mean + ci95, color=style["color"], alpha=0.2, lw=0
        )
        missed.plot(100 * curves.false_alarms, 100 * curves.misses, **style)
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
