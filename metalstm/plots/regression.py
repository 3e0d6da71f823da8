"""Functions of one input before and after adaptation, and the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metalstm.plots.optimizers import Losses, loss_panels
from metalstm.plots.style import COLOURS, add_note, method_styles, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FittedTask", "function_fits", "seed_spread", "target_errors"]


class FittedTask(NamedTuple):
    """A task's support points, and its function on the grid; D targets, or one."""

    x: np.ndarray  # [N]
    y: np.ndarray  # [N] or [N, D]
    curve: np.ndarray  # [G] or [G, D]


def function_fits(
    tasks: Sequence[FittedTask],
    grid: np.ndarray,
    functions: Mapping[str, np.ndarray],
    steps: Sequence[int],
    *,
    targets: Sequence[str] = (),
) -> Figure:
    """Draw networks before and after adaptation, a row a task, a column a method.

    With D targets a task has D rows. Where there are several seeds, the line is their
    mean and the band their range.

    Args:
      grid: inputs [G].
      functions: per method its outputs after 0 .. T updates, [tasks, T + 1, G], or
        [.., G, D] where the tasks' curves are [G, D]; with or without leading [seeds].
      steps: which updates to draw, the first in dots.
      targets: D names.

    Raises:
      ValueError: another number of names.
    """
    width = tasks[0].curve.shape[1] if np.ndim(tasks[0].curve) == 2 else 1
    _check_names(targets or range(width), width)
    size = width * len(tasks), len(functions)
    figure = new_figure((3.2 * size[1], 2.1 * size[0]))
    rows = figure.subplots(*size, sharex=True, sharey="row", squeeze=False)
    found = {n: _by_target(f, tasks) for n, f in functions.items()}
    for index, row in enumerate(rows):
        which, target = divmod(index, width)
        task = tasks[which]
        curve, y = (
            np.reshape(a, (len(a), -1))[:, target] for a in (task.curve, task.y)
        )
        for axes, outputs in zip(row, found.values(), strict=True):
            axes.plot(grid, curve, color="grey", lw=4, alpha=0.35, label="task")
            for number, step in enumerate(steps):
                style: dict[str, Any] = {"lw": 1.4, "ls": "-" if number else ":"}
                style["label"] = _updates(step) if step else "before"
                style["color"] = COLOURS[number - 1]
                of_seeds = outputs[:, which, step, :, target]
                axes.plot(grid, of_seeds.mean(0), **style)
                if len(of_seeds) > 1:
                    ends = of_seeds.min(0), of_seeds.max(0)
                    axes.fill_between(
                        grid, *ends, color=style["color"], alpha=0.15, lw=0
                    )
            axes.plot(task.x, y, "k^", ms=5, label="support")
            axes.grid(alpha=0.3)
        if targets:
            row[0].set_ylabel(targets[target])
    for axes, name in zip(rows[0], functions, strict=True):
        axes.set_title(name, fontsize=10)
    handles, labels = rows[0][-1].get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": len(labels)}
    figure.legend(handles, labels, fontsize=8, frameon=False, **place)
    if any(len(outputs) > 1 for outputs in found.values()):
        add_note(
            figure, "line: the mean of seeds, band: from the lowest to the highest"
        )
    return figure


def _by_target(outputs: np.ndarray, tasks: Sequence[FittedTask]) -> np.ndarray:
    """[seeds, tasks, T + 1, G, D], whichever of these axes are there."""
    outputs = np.asarray(outputs)
    if np.ndim(tasks[0].curve) == 1:
        outputs = outputs[..., None]
    return outputs if outputs.ndim == 5 else outputs[None]


def target_errors(
    errors: Mapping[str, np.ndarray],
    *,
    targets: Sequence[str] = (),
    xlabel: str = "updates on the support set",
) -> Figure:
    """Draw the mean squared error of each target over updates, a panel a target.

    The band is the 95% CI over tasks.

    Args:
      errors: per method [tasks, T + 1], or [tasks, T + 1, D], such as the ``errors``
        of `metalstm.Evaluation` after each number of updates, stacked.
      targets: D names; otherwise they are numbered.

    Raises:
      ValueError: another number of names.
    """
    by_method = {n: np.reshape(e, (*np.shape(e)[:2], -1)) for n, e in errors.items()}
    width = next(iter(by_method.values())).shape[-1]
    if not targets:
        numbered = [f"target {index + 1}" for index in range(width)]
        targets = numbered if width > 1 else ["all targets"]
    panels: dict[str, dict[str, Losses]] = {target: {} for target in targets}
    for name, found in by_method.items():
        _check_names(targets, found.shape[-1])
        for index, target in enumerate(targets):
            steps = np.arange(found.shape[1])
            panels[target][name] = Losses(steps, found[:, :, index])
    return loss_panels(panels, xlabel=xlabel, ylabel="mean squared error", over="tasks")


def seed_spread(
    errors: Mapping[str, np.ndarray], steps: Sequence[int], *, ylabel: str
) -> Figure:
    """Draw the mean error of each seed, a panel a number of updates.

    Args:
      errors: per method [seeds, tasks, T + 1].
      steps: which updates to draw.
    """
    figure, styles = new_figure((3.6 * len(steps), 3.2)), method_styles(errors)
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        for index, (name, found) in enumerate(errors.items()):
            means, style = found[..., step].mean(1), styles[name]
            at = np.full(len(means), index)
            axes.plot(at, means, **style | {"linestyle": "", "alpha": 0.6})
            axes.hlines(means.mean(), index - 0.3, index + 0.3, color=style["color"])
        axes.set(yscale="log", title=_updates(step), xticks=range(len(errors)))
        axes.set_xticklabels(errors, rotation=45, ha="right", fontsize=8)
        axes.grid(alpha=0.3, which="both", axis="y")
    figure.axes[0].set_ylabel(ylabel)
    return figure


def _check_names(targets: Sequence[Any], width: int) -> None:
    if len(targets) != width:
        raise ValueError(
            f"targets={list(targets)} are {len(targets)} and there are {width} targets:"
            " give each a name of its own"
        )


def _updates(number: int) -> str:
    return f"{number} update" + "s" * (number != 1)
