"""The style of every figure: colours by name, bands, and the files it is saved to."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metalstm.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DASHES",
    "RIGHT",
    "WRONG",
    "add_grid_and_legend",
    "add_note",
    "interval",
    "known_colour",
    "method_styles",
    "new_figure",
    "save_figure",
]

# Okabe and Ito's colours: colour-blind readers can distinguish them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG = "#009E73", "#D55E00"
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (8, 4)), (0, (4, 1, 1, 1, 1, 1)),
)  # fmt: skip
_FILLS = ("full", "none", "left", "right", "top", "bottom")

# A column for each colour, a row for each marker. Methods that are often compared
# differ in their colours.
_STYLES = {
    "o": "meta-lstm maml prototypical reptile fomaml nearest-neighbour scratch",
    "^": "gates l2l v2 meta-sgd learned-sgd learned-rule joint",
    "s": "adagrad adamw adadelta rmsprop nesterov adam sgd",
    "D": "fo-meta-lstm anil imaml matching gradient-agreement feature-neighbour "
    "momentum",
    "v": "mann feature-centroid adam-cosine hallucination finetune-head feature-cosine "
    "relation",
    "P": "siamese finetune-all prototypical-cosine am-softmax baseline++ arcface "
    "sphereface",
    "X": "meta-lstm-f1 l2l-published matching-euclidean matching-fce relation-softmax "
    "siamese-triplet pixels",
    "p": "gates-v1 moment-lstm lion muon schedule-free moment-gates moment-network",
    "*": "gates-f1 v2-f1 nearest-centroid base-mean ridge logistic-regression lda",
}
_KNOWN = {
    name: (colour, marker)
    for marker, names in _STYLES.items()
    for colour, name in zip(COLOURS, names.split(), strict=True)
}


def method_styles(
    names: Iterable[str], *, learned: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the line style of each method: keyword arguments of ``axes.plot``.

    Colour and marker follow from the name alone (up to a bracket or comma, as in ``maml
    (run 2)``), so that a method has the same ones in every figure. Where lines of one
    figure share a colour, the later ones are dashed; where they share the marker too,
    it is hollow.

    Args:
      learned: names to draw in thick lines.
    """
    colours: Counter[str] = Counter()
    both: Counter[tuple[str, str]] = Counter()
    styles = {}
    for name in names:
        colour, marker = _colour_and_marker(_plain(name))
        styles[name] = {
            "color": colour,
            "marker": marker,
            "linestyle": DASHES[colours[colour] % len(DASHES)],
            "fillstyle": _FILLS[both[colour, marker] % len(_FILLS)],
            "linewidth": 2.2 if name in learned else 1.2,
            "markersize": 4,
        }
        colours[colour] += 1
        both[colour, marker] += 1
    return styles


def known_colour(name: str) -> str | None:
    """Return the colour of one of the library's methods, None for any other name."""
    return _KNOWN.get(_plain(name), (None,))[0]


def _plain(name: str) -> str:
    return name.partition(" (")[0].partition(", ")[0]


def _colour_and_marker(name: str) -> tuple[str, str]:
    if name in _KNOWN:
        return _KNOWN[name]
    markers = list(_STYLES)
    row, column = divmod(zlib.crc32(name.encode()), len(COLOURS))
    return COLOURS[column], markers[row % len(markers)]


def interval(
    mean: Any, half: Any, lowest: Any = -np.inf, highest: Any = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of ``mean`` ± ``half`` that can be: in [lowest, highest].

    >>> interval([0.5, 0.99], [0.1, 0.03], highest=1.0)[1].tolist()
    [0.6, 1.0]
    """
    mean, half = np.asarray(mean, float), np.asarray(half, float)
    return np.clip(mean - half, lowest, highest), np.clip(mean + half, lowest, highest)


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


def save_figure(
    figure: Figure, path: str | Path, *, formats: Sequence[str] = ("png", "pdf")
) -> list[Path]:
    """Write a figure in each format, complete or not at all; return the files.

    The PDF holds its fonts as TrueType (type 42), which journals ask for, and no date,
    so that the same figure is the same file.

    Args:
      path: with any of the suffixes, or without one.
    """
    import matplotlib as mpl

    path, files = Path(path), []
    stem = path.stem if path.suffix[1:] in formats else path.name
    for kind in formats:
        files.append(path.with_name(f"{stem}.{kind}"))
        metadata = {"CreationDate": None} if kind == "pdf" else None
        with mpl.rc_context({"pdf.fonttype": 42}), atomic_write(files[-1]) as part:
            figure.savefig(part, format=kind, metadata=metadata)
    return files


def add_note(figure: Figure, text: str) -> None:
    """Say below a figure what its bands and lines are."""
    figure.supxlabel(text, fontsize=8, color="0.35")


def add_grid_and_legend(axes: Any, *, fontsize: float = 7) -> None:
    """Draw a faint grid, and a legend where any line has a label."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=fontsize)
