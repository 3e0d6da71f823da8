"""The images of one task, and their predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstm.plots.style import RIGHT, WRONG, add_note, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["episode_picture"]

_MAX_SHOT, _MAX_QUERIES = 5, 8  # images of a class that are drawn


def episode_picture(
    support: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    before: np.ndarray,
    after: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw one task: a row a class, its support images, then queries and predictions.

    Args:
      support: images [N, H, W, ch] in [0, 1] and labels [N].
      query: likewise, [M, ...].
      before: predicted labels [M] of the queries before adaptation.
      after: after it. A frame is green where the prediction after is right; below each
        query: the class before, and after.
      class_names: how to write label k; default its number.
    """
    support_x, support_y = (np.asarray(a) for a in support)
    query_x, query_y = (np.asarray(a) for a in query)
    before, after = np.asarray(before), np.asarray(after)
    way = int(max(support_y.max(), query_y.max())) + 1
    names = [str(k) for k in range(way)] if class_names is None else list(class_names)
    shot = min(_MAX_SHOT, int(np.bincount(support_y, minlength=way).max()))
    queries = min(_MAX_QUERIES, int(np.bincount(query_y, minlength=way).max()))
    columns = shot + queries
    figure = new_figure((0.4 + 0.95 * columns, 0.5 + 1.15 * way))
    grid = figure.subplots(way, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_visible(False)
    for label in range(way):
        for axes, image in zip(
            grid[label], support_x[support_y == label], strict=False
        ):
            _draw_image(axes, image)
        grid[label][0].set_ylabel(names[label], rotation=0, ha="right", va="center")
        mine = np.flatnonzero(query_y == label)[:queries]
        for axes, index in zip(grid[label][shot:], mine, strict=False):
            _draw_image(axes, query_x[index])
            colour = RIGHT if after[index] == label else WRONG
            text = f"{names[before[index]]} → {names[after[index]]}"
            axes.set_xlabel(text, fontsize=8, color=colour, labelpad=2)
            for side in axes.spines.values():
                side.set(color=colour, linewidth=2)
    grid[0][0].set_title("support", fontsize=9)
    grid[0][shot].set_title("queries", fontsize=9)
    right = [f"{np.mean(labels == query_y):.0%}" for labels in (before, after)]
    figure.suptitle(
        f"right: {right[0]} before, {right[1]} after adaptation", fontsize=9
    )
    add_note(
        figure,
        "row: a class; below each query: the class predicted before → after adaptation",
    )
    return figure


def _draw_image(axes: Any, image: np.ndarray) -> None:
    axes.set_visible(True)
    image = np.clip(image, 0, 1)
    if image.shape[-1] == 1:
        axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axes.imshow(image)
