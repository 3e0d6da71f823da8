"""Colours, line styles and the empty figure that every picture starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DASHES",
    "MARKERS",
    "RIGHT",
    "WRONG",
    "add_grid_and_legend",
    "add_note",
    "line_style",
    "new_figure",
]

# Okabe and Ito's colours: colour-blind readers can distinguish them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG = "#009E73", "#D55E00"
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (8, 4)), (0, (4, 1, 1, 1, 1, 1)),
)  # fmt: skip
MARKERS = ("o", "^", "s", "D", "v", "P")


def line_style(index: int, learned: bool = False) -> dict[str, Any]:
    """Return the style of the line at ``index``; a learned rule's is thick."""
    lines = ("-", "--", ":", "-.")
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": lines[index // len(COLOURS) % len(lines)],
        "linewidth": 2.2 if learned else 1.0,
    }


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of ``size``, in inches.

    Raises:
      ImportError: without matplotlib, naming the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'metalstm[experiments]'"
        ) from error
    return Figure(figsize=size, layout="constrained", dpi=120)


def add_note(figure: Figure, text: str) -> None:
    """Say below a figure what its bands and lines are."""
    figure.supxlabel(text, fontsize=8, color="0.35")


def add_grid_and_legend(axes: Any, *, fontsize: float = 7) -> None:
    """Draw a faint grid, and a legend where any line has a label."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=fontsize)
