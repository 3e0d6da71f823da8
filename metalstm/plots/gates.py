"""The gates of an update rule over the steps of an inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from metalstm.base import PyTree
from metalstm.plots.style import COLOURS, add_note, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["gate_curves", "layer_groups"]


def layer_groups(params: PyTree) -> list[tuple[str, np.ndarray]]:
    """Name each layer and the coordinates it owns in the flattened parameters.

    A layer is all leaves with the same path but for the last key (kernel and bias).
    """
    groups: dict[str, list[np.ndarray]] = {}
    offset = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        name = "/".join(parts[:-1] or parts) or "parameters"
        groups.setdefault(name, []).append(np.arange(offset, offset + np.size(leaf)))
        offset += np.size(leaf)
    return [(name, np.concatenate(indices)) for name, indices in groups.items()]


def gate_curves(
    forget: np.ndarray,
    input: np.ndarray,  # noqa: A002 (the gate's name)
    layers: Sequence[tuple[str, np.ndarray]],
    *,
    max_layers: int = 12,
) -> Figure:
    """Draw the gates over update steps, a column a layer, a line a task.

    As figure 2 of Ravi & Larochelle (2017): each line is the mean over the layer's
    coordinates; the band holds the middle 80% of all its coordinates and tasks.

    Args:
      forget: f, [tasks, T, N].
      input: i, likewise.
      layers: as `layer_groups` returns them; the first ``max_layers`` are drawn.
    """
    forget, input = np.asarray(forget), np.asarray(input)  # noqa: A001
    layers = list(layers)[:max_layers]
    figure = new_figure((1.2 + 1.9 * len(layers), 4.2))
    grid = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    steps = np.arange(1, forget.shape[1] + 1)
    for row, (gate, values) in enumerate((("forget", forget), ("input", input))):
        for axes, (name, indices) in zip(grid[row], layers, strict=True):
            chosen = values[:, :, indices]
            low, high = np.quantile(chosen, [0.1, 0.9], axis=(0, 2))
            axes.fill_between(steps, low, high, color=COLOURS[row], alpha=0.15)
            for task in chosen.mean(-1):
                axes.plot(steps, task, color=COLOURS[row], alpha=0.4, linewidth=0.8)
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(name, fontsize=8)
            else:
                axes.set_xlabel("update step", fontsize=8)
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelsize=7)
        grid[row][0].set_ylabel(f"{gate} gate")
    add_note(
        figure,
        "line: mean over a layer's parameters in one task\n"
        "band: the middle 80% of parameters and tasks",
    )
    return figure
