"""The two errors of verification against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from metalstm.plots.style import line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["roc_curves"]


def roc_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Draw true accepts against false accepts, the latter on a log scale.

    A line's dot is where both errors are equally frequent.

    Args:
      curves: per method, false and true accepts [K] in [0, 1], both rising, as
        `metalstm.verification.Verification` has them.
    """
    figure = new_figure((6.5, 4.8))
    axes = figure.subplots()
    smallest = min(false[false > 0].min() for false, _ in curves.values())
    left = min(smallest, 1e-2)
    for index, (name, (false, true)) in enumerate(curves.items()):
        style = line_style(index) | {"linewidth": 1.6}
        shown = np.maximum(false, left)  # none has no place on a log scale
        axes.plot(shown, 100 * true, drawstyle="steps-post", label=name, **style)
        equal = int(np.argmax(false >= 1 - true))
        axes.plot(shown[equal], 100 * true[equal], "o", color=style["color"], ms=5)
    even = np.geomspace(left, 1)
    axes.plot(even, 100 * even, color="grey", linestyle=":", label="chance")
    about = "false accepts (dot: as frequent as false rejects)"
    axes.set(xlabel=about, ylabel="true accepts, %", title=title)
    axes.set(xscale="log", xlim=(left, 1), ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure
