"""Pictures of a run. Each function returns a matplotlib Figure; the caller saves it.

Matplotlib is imported inside the functions, and pyplot never: no global state, no
display, nothing to close.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from metalstm.base import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Losses",
    "Sweep",
    "accuracy_bars",
    "accuracy_sweep",
    "episode_picture",
    "escape_curves",
    "gate_curves",
    "layer_groups",
    "learning_curves",
    "loss_panels",
    "meta_training_curves",
    "rate_sweeps",
    "roc_curves",
]

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RIGHT, _WRONG = "#009E73", "#D55E00"


class Curve(NamedTuple):
    """One seed's values against meta-training episodes."""

    episodes: np.ndarray  # [S] ascending
    values: np.ndarray  # [S]
    ci95: np.ndarray | None = None  # [S] half-width, None when unknown


class Losses(NamedTuple):
    """One optimizer's losses on many problems."""

    steps: np.ndarray  # [S] updates done
    values: np.ndarray  # [problems, S]; not finite where it diverged


class Sweep(NamedTuple):
    """How well each of a grid of learning rates did."""

    rates: np.ndarray  # [R] ascending
    scores: np.ndarray  # [R] lower is better; infinite where it diverged


def learning_curves(
    loss: Mapping[str, Sequence[Curve]],
    accuracy: Mapping[str, Sequence[Curve]],
    validation: Mapping[str, Sequence[Curve]],
    *,
    title: str = "",
    chance: float | None = None,
) -> Figure:
    """Draw loss and accuracy against episodes, one colour a method.

    Args:
      loss: per method one curve per seed, on meta-training episodes.
      accuracy: likewise, in [0, 1]; drawn thin.
      validation: likewise, on meta-validation episodes; drawn with markers. The band is
        the 95% CI over seeds, or with one seed that over episodes (``Curve.ci95``).
      chance: a dotted line at this accuracy.
    """
    methods = list(dict.fromkeys([*loss, *accuracy, *validation]))
    crowded = len(methods) > len(_COLOURS)
    figure = _figure((12.5, max(4, 1 + 0.15 * len(methods))) if crowded else (10, 4))
    left, right = figure.subplots(1, 2)
    styles = {}
    for index, method in enumerate(methods):
        style = _optimizer_style(index, learned=False)
        styles[method] = {"colour": style["color"], "linestyle": style["linestyle"]}
    for method, seeds in loss.items():
        _draw_seeds(left, _smoothed(seeds), label=method, **styles[method])
    for method, seeds in accuracy.items():
        _draw_seeds(right, _smoothed(seeds), alpha=0.45, scale=100, **styles[method])
    for method, seeds in validation.items():
        label = f"{method}, validation"
        _draw_seeds(right, seeds, label=label, scale=100, marker="o", **styles[method])
    if chance is not None:
        right.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    left.set(xlabel="meta-training episodes", ylabel="query loss", title=title)
    right.set(xlabel="meta-training episodes", ylabel="query accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0] and not crowded:
            axes.legend(fontsize=8)
    if crowded:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


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
    figure = _figure((1.2 + 1.9 * len(layers), 4.2))
    grid = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    steps = np.arange(1, forget.shape[1] + 1)
    for row, (gate, values) in enumerate((("forget", forget), ("input", input))):
        for axes, (name, indices) in zip(grid[row], layers, strict=True):
            chosen = values[:, :, indices]
            low, high = np.quantile(chosen, [0.1, 0.9], axis=(0, 2))
            axes.fill_between(steps, low, high, color=_COLOURS[row], alpha=0.15)
            for task in chosen.mean(-1):
                axes.plot(steps, task, color=_COLOURS[row], alpha=0.4, linewidth=0.8)
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(name, fontsize=8)
            else:
                axes.set_xlabel("update step", fontsize=8)
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelsize=7)
        grid[row][0].set_ylabel(f"{gate} gate")
    return figure


def episode_picture(
    support: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    before: np.ndarray,
    after: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    max_shot: int = 5,
    max_queries: int = 8,
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
    shot = min(max_shot, int(np.bincount(support_y, minlength=way).max()))
    queries = min(max_queries, int(np.bincount(query_y, minlength=way).max()))
    columns = shot + queries
    figure = _figure((0.4 + 0.95 * columns, 0.5 + 1.15 * way))
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
            colour = _RIGHT if after[index] == label else _WRONG
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
    return figure


def accuracy_bars(
    accuracies: Mapping[str, tuple[float, float]],
    *,
    chance: float | None = None,
    title: str = "",
) -> Figure:
    """Draw accuracy and its 95% CI, per method ``(mean, half-width)`` in [0, 1]."""
    figure = _figure((6.5, 0.9 + 0.42 * len(accuracies)))
    axes = figure.subplots()
    names = list(accuracies)
    means = 100 * np.array([accuracies[n][0] for n in names])
    errors = 100 * np.array([accuracies[n][1] for n in names])
    rows = range(len(names))
    colours = [_COLOURS[i % len(_COLOURS)] for i in rows]
    axes.barh(rows, means, xerr=errors, color=colours, alpha=0.85, capsize=3)
    for row, mean, error in zip(rows, means, errors, strict=True):
        axes.text(mean + error + 1, row, f"{mean:.1f} ± {error:.1f}", va="center")
    if chance is not None:
        axes.axvline(100 * chance, color="grey", linestyle=":")
    axes.set(yticks=rows, yticklabels=names, xlabel="accuracy, %", title=title)
    axes.set_xlim(0, 118)
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
    figure = _figure((8.6, max(4.6, 1.6 + 0.16 * len(sweeps))))
    axes = figure.subplots()
    order = list(dict.fromkeys(families[name] for name in sweeps))
    xs = sorted({x for points in sweeps.values() for x, _, _ in points})
    colours = {}
    for name, points in sweeps.items():
        alike = [n for n in sweeps if families[n] == families[name]]
        index = alike.index(name)
        colours[name] = _COLOURS[index % len(_COLOURS)]
        x, mean, half = np.array(points, float).T
        axes.plot(
            x,
            mean,
            color=colours[name],
            linestyle=_DASHES[order.index(families[name]) % len(_DASHES)],
            marker=_MARKERS[index // len(_COLOURS) % len(_MARKERS)],
            markersize=3.5,
            linewidth=2.6 if name in bold else 1.2,
            zorder=3 if name in bold else 2,
            label=name,
        )
        # many bands on top of each other hide the lines
        alpha = 0.15 if name in bold or len(sweeps) <= 8 else 0.05
        axes.fill_between(
            x, mean - half, mean + half, color=colours[name], alpha=alpha, lw=0
        )
    if chance:
        x, level = np.array(chance, float).T
        axes.plot(x, level, color="grey", linestyle=(0, (1, 2)), linewidth=1.6)
        axes.annotate("chance", (x[0], level[0]), (2, 3), textcoords="offset points")
    means = [[mean for _, mean, _ in points] for points in sweeps.values()]
    _accuracy_scale(axes, means)
    # lines end at the right edge, where their names are
    axes.set(xscale="log", xlim=(0.94 * xs[0], xs[-1] * 1.02))
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    _name_ends(axes, sweeps, colours, bold)
    _family_legend(figure, order)
    return figure


def _accuracy_scale(axes: Any, lines: Sequence[Sequence[float]]) -> None:
    """Per cent on a scale of odds where most lines end above 90%, or a linear one."""
    lowest, highest = axes.dataLim.intervaly
    if np.median([line[-1] for line in lines]) > 0.9:
        # a band may pass 1, which a scale of odds cannot show
        highest = min(highest, 1 - (1 - max(map(max, lines))) / 2)
        highest = min(highest, 0.9995)
        axes.set_yscale("logit", nonpositive="clip")
        axes.set_yticks([t for t in _ODDS_TICKS if lowest <= t <= highest])
        axes.set_ylim(0.85 * lowest, highest)
    else:
        axes.set_ylim(lowest - 0.03, min(1, highest) + 0.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")


_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1, 1)), "-.", (0, (8, 4)), (0, (4, 1, 1, 1, 1, 1)),
)  # fmt: skip
_MARKERS = ("o", "^", "s", "D", "v", "P")
_ODDS_TICKS = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995,
    0.998, 0.999,
)  # fmt: skip


def _name_ends(
    axes: Any,
    sweeps: Mapping[str, Sequence[tuple[float, float, float]]],
    colours: Mapping[str, str],
    bold: Sequence[str],
    fontsize: float = 7.5,
) -> None:
    """Write names right of the axes at the height of their lines' ends, apart."""
    to_axes = axes.transAxes.inverted()
    ends = {
        name: to_axes.transform(
            axes.transData.transform((points[-1][0], min(points[-1][1], 0.9999)))
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
    """The nearest ascending positions in [0, 1] that are ``gap`` apart (least squares).

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
        Line2D(
            [], [], color="black", linewidth=1.3, linestyle=_DASHES[i % len(_DASHES)]
        )
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


def meta_training_curves(
    loss: Mapping[str, Curve], validation: Mapping[str, Curve]
) -> Figure:
    """Draw the meta-loss of rules, and their mean log-loss on other problems.

    Args:
      loss: per rule, against meta-steps (``Curve.episodes``).
      validation: likewise; the band is the CI over problems.
    """
    figure = _figure((10, 4))
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys([*loss, *validation]))
    for index, name in enumerate(names):
        colour = _COLOURS[index % len(_COLOURS)]
        if name in loss:
            _draw_seeds(left, _smoothed([loss[name]]), colour=colour, label=name)
        if name in validation:
            curve = [validation[name]]
            _draw_seeds(right, curve, colour=colour, label=name, marker="o")
    left.set(xlabel="meta-steps", ylabel="meta-loss")
    right.set(xlabel="meta-steps", ylabel="validation, mean log of the last loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def loss_panels(
    panels: Mapping[str, Mapping[str, Losses]],
    *,
    geometric: Sequence[str] = (),
    learned: Sequence[str] = (),
    columns: int = 3,
) -> Figure:
    """Draw losses against updates on a log scale, a panel a problem, a line a rule.

    The band is the 95% CI over problems. Where any problem has diverged there is no
    mean, and the line ends.

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
    figure = _figure((width * columns, 0.72 * width * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for drawn in panels.values() for name in drawn))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, drawn) in zip(grid.flat, panels.items(), strict=False):
        # hand-made optimizers first: a learned rule's line lies over theirs
        for name in sorted(drawn, key=lambda name: name in learned):
            mean, low, high = _band(drawn[name].values, title in geometric)
            style = _optimizer_style(names.index(name), name in learned)
            axes.plot(drawn[name].steps, mean, label=name, **style)
            axes.fill_between(
                drawn[name].steps, low, high, color=style["color"], alpha=0.2, lw=0
            )
        ylabel = "loss (geometric mean)" if title in geometric else "loss"
        axes.set(xlabel="updates", ylabel=ylabel, yscale="log")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def rate_sweeps(
    sweeps: Mapping[str, Sweep], *, ylabel: str = "last loss", log: bool = True
) -> Figure:
    """Draw what each learning rate of a grid gave, the best of each line marked.

    Args:
      sweeps: per optimizer its grid; where it diverged there is no point.
      log: a log scale, for scores above zero.
    """
    figure = _figure((6.5, 4.4))
    axes = figure.subplots()
    for index, (name, (rates, scores)) in enumerate(sweeps.items()):
        rates, scores = np.asarray(rates), np.asarray(scores, float)
        shown = np.where(np.isfinite(scores), scores, np.nan)
        style = _optimizer_style(index, learned=False) | {"linewidth": 1.2}
        axes.plot(rates, shown, marker=".", label=name, **style)
        if np.isfinite(shown).any():
            best = int(np.nanargmin(shown))
            axes.plot(rates[best], shown[best], "o", color=style["color"], ms=8)
    axes.set(xlabel="learning rate", ylabel=ylabel, xscale="log")
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def roc_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Draw true accepts against false accepts, the latter on a log scale.

    A line's dot is where both errors are equally frequent.

    Args:
      curves: per method, false and true accepts [K] in [0, 1], both rising, as
        `metalstm.verification.Verification` has them.
    """
    figure = _figure((6.5, 4.8))
    axes = figure.subplots()
    smallest = min(false[false > 0].min() for false, _ in curves.values())
    left = min(smallest, 1e-2)
    for index, (name, (false, true)) in enumerate(curves.items()):
        style = _optimizer_style(index, learned=False) | {"linewidth": 1.6}
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


def escape_curves(
    escaped: Mapping[str, tuple[np.ndarray, np.ndarray]],
    forget: Mapping[str, np.ndarray] | None = None,
    *,
    learned: Sequence[str] = (),
) -> Figure:
    """Draw which share of problems has left a plateau, and what forget gates did.

    Args:
      escaped: per optimizer the updates [S] and the share [S] in [0, 1].
      forget: per rule f, [problems, T, N]; a line for its mean, a band for the middle
        80% of problems and coordinates. None: no second panel.
    """
    figure = _figure((10 if forget else 6.5, 4))
    left, *right = figure.subplots(1, 2 if forget else 1, squeeze=False)[0]
    for index, (name, (steps, share)) in enumerate(escaped.items()):
        style = _optimizer_style(index, name in learned)
        left.plot(steps, 100 * np.asarray(share), label=name, **style)
    left.set(xlabel="updates", ylabel="escaped, % of problems", ylim=(-3, 103))
    for axes in right:
        for name, values in (forget or {}).items():
            colour = _optimizer_style(list(escaped).index(name), True)["color"]
            steps = np.arange(1, values.shape[1] + 1)
            low, high = np.quantile(values, [0.1, 0.9], axis=(0, 2))
            axes.plot(steps, values.mean((0, 2)), color=colour, label=name)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="updates", ylabel="forget gate")
    for axes in (left, *right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _optimizer_style(index: int, learned: bool) -> dict[str, Any]:
    lines = ("-", "--", ":", "-.")
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": lines[index // len(_COLOURS) % len(lines)],
        "linewidth": 2.2 if learned else 1.0,
    }


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
    return mean, np.maximum(mean - half, 1e-3 * np.abs(mean)), mean + half


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'metalstm[experiments]'"
        ) from error
    return Figure(figsize=size, layout="constrained", dpi=120)


def _draw_seeds(
    axes: Any,
    seeds: Sequence[Curve],
    *,
    colour: str,
    label: str | None = None,
    alpha: float = 1.0,
    scale: float = 1.0,
    marker: str = "",
    linestyle: str = "-",
) -> None:
    seeds = [curve for curve in seeds if len(curve.episodes)]
    if not seeds:
        return
    episodes, mean, band = _over_seeds(seeds)
    mean = scale * mean
    style = {"marker": marker, "markersize": 3, "linewidth": 1.4, "alpha": alpha}
    style |= {"color": colour, "linestyle": linestyle}
    axes.plot(episodes, mean, label=label, **style)
    if band is not None:
        low, high = mean - scale * band, mean + scale * band
        axes.fill_between(episodes, low, high, color=colour, alpha=0.2 * alpha)


def _over_seeds(
    seeds: Sequence[Curve],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean over seeds at the first seed's episodes, and half the width of its CI."""
    episodes = np.asarray(seeds[0].episodes)
    if len(seeds) == 1:
        return episodes, np.asarray(seeds[0].values), seeds[0].ci95
    # by time, seeds stop at different episodes: compare where all have been
    episodes = episodes[episodes <= min(curve.episodes[-1] for curve in seeds)]
    values = np.stack([np.interp(episodes, c.episodes, c.values) for c in seeds])
    half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(seeds))
    return episodes, values.mean(0), half


def _smoothed(seeds: Sequence[Curve], points: int = 60) -> list[Curve]:
    """Average neighbours, so that some ``points`` remain of a noisy curve."""
    smooth = []
    for curve in seeds:
        width = max(1, len(curve.values) // points)
        whole = len(curve.values) // width * width
        blocks = [np.asarray(a)[:whole].reshape(-1, width).mean(1) for a in curve[:2]]
        smooth.append(Curve(*blocks))
    return smooth


def _draw_image(axes: Any, image: np.ndarray) -> None:
    axes.set_visible(True)
    image = np.clip(image, 0, 1)
    if image.shape[-1] == 1:
        axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axes.imshow(image)
