"""The report of `held_out`: tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.report import save_figure
from experiments.common.run_folder import write_json
from experiments.common.tables import Table
from experiments.learned_optimizer.held_out_cells import (
    OPTIMIZERS,
    RECORDS,
    SEEDS,
)
from experiments.learned_optimizer.held_out_rows import (
    Row,
    Rows,
    iqm,
    iqm_interval,
    names_of,
    ratio,
    read_cells,
    read_document,
    rows_of,
    share_until,
    to_json,
)
from experiments.learned_optimizer.held_out_tasks import TASKS
from metalstm import plots
from metalstm.runtime.files import atomic_write

REFERENCE = "adamw"
_SHOWN = (0.2, 5.0)  # ratios in the figure

# -- tables ----------------------------------------------------------------------------


def tables(rows: Rows, missing: Sequence[str]) -> list[Table]:
    """Losses of every task; a line an optimizer of what follows; other rates."""
    reference = rows.get(REFERENCE, {})
    found = [_losses(rows, reference, missing)]
    if reference:
        found.append(_summary(rows, reference))
    if any(row.by_rate.size for of in rows.values() for row in of.values()):
        found.append(_rates(rows, reference))
    return found


def _losses(rows: Rows, reference: dict[str, Row], missing: Sequence[str]) -> Table:
    def cell(label: str, task: str) -> str:
        if (row := rows[label].get(task)) is None:
            return ""
        if (base := reference.get(task)) is None or label == REFERENCE:
            return f"{row.median:.4g}"
        return f"{row.median:.4g} ({ratio(row.median, base.median):.3f})"

    done = [task for task in TASKS if any(task in of for of in rows.values())]
    cells = [[task, *(cell(label, task) for label in rows)] for task in done]
    notes = [f"missing: {line}" for line in missing]
    near_zero = [
        t for t, row in reference.items() if row.median < 0.01 * row.curves[0, 0]
    ]
    if near_zero:
        notes.append(f"AdamW ends below 1% of its first loss: {', '.join(near_zero)}")
    caption = f"Median last loss of {len(SEEDS)} seeds (its ratio to tuned AdamW's)"
    return Table(caption, ["task", *rows], cells, notes=notes)


def _summary(rows: Rows, reference: dict[str, Row]) -> Table:
    lines, notes = [], []
    for label, of in rows.items():
        pairs = {t: (row, reference[t]) for t, row in of.items() if t in reference}
        ratios = {t: ratio(a.median, b.median) for t, (a, b) in pairs.items()}
        if without := [task for task, value in ratios.items() if np.isnan(value)]:
            where = ", ".join(without)
            said = f"{label}: no ratio, a loss is not above 0 or AdamW's: {where}"
            notes.append(said)
        used = [pair for task, pair in pairs.items() if task not in without]
        if used:
            lines.append({"optimizer": label} | _against(used))
    columns = {
        "optimizer": "{optimizer}",
        "trials": "{trials}",
        "below AdamW": "{below}",
        "IQM of ratios [95%]": "{iqm}",
        "updates to AdamW's loss": "{until}",
        "reached": "{reached}",
        "diverged": "{diverged}",
        "optimum inside": "{inside}",
    }
    caption = "Over tasks, against AdamW with its rate and schedule tuned"
    notes.append(
        "updates to AdamW's loss: median over tasks of the share until the first of "
        f"{RECORDS} records that is not above it; AdamW's own row says what of it is "
        "noise; diverged: share of the runs"
    )
    return Table.of(caption, columns, lines, notes=notes)


def _against(pairs: Sequence[tuple[Row, Row]]) -> dict[str, str]:
    """One line of the summary, of (an optimizer's row, AdamW's) on each task."""
    mine, base = (np.stack([p[k].curves[:, -1] for p in pairs]) for k in (0, 1))
    ratios = np.median(mine, 1) / np.median(base, 1)
    until = [share_until(row.curves, other.median) for row, other in pairs]
    low, high = iqm_interval(mine, base)
    inside = [row.inside for row, _ in pairs if row.inside is not None]
    fewest, most = (f(row.trials for row, _ in pairs) for f in (min, max))
    trials = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return {
        "trials": trials,
        "below": f"{(ratios < 1).sum()} of {len(pairs)}",
        "iqm": f"{float(iqm(ratios)):.3f} [{low:.3f}, {high:.3f}]",
        "until": "never" if np.median(until) > 1 else f"{np.median(until):.0%}",
        "reached": f"{np.isfinite(until).sum()} of {len(pairs)}",
        "diverged": f"{np.mean([row.diverged for row, _ in pairs]):.3g}",
        "inside": f"{sum(inside)} of {len(inside)}" if inside else "",
    }


def _rates(rows: Rows, reference: dict[str, Row]) -> Table:
    cells, tasks = [], dict[str, None]()
    for label, of in rows.items():
        have = [t for t, row in of.items() if row.by_rate.size and t in reference]
        if not have:
            continue
        values = np.array(
            [[ratio(x, reference[t].median) for x in of[t].by_rate] for t in have]
        )
        best = values.argmin(-1)
        inside = ((best > 0) & (best < values.shape[1] - 1)).sum()
        middle = (f"{x:.3g}" for x in np.median(values, 0))
        cells.append([label, *middle, f"{inside} of {len(have)}"])
        tasks |= dict.fromkeys(have)
    factors = [f"x 10^{step / 2:+.1f}" for step in range(-3, 4)]
    caption = (
        "One seed at other rates: median over tasks of the ratio to tuned AdamW's loss "
        f"({', '.join(tasks)}), and on how many the best of the seven is inside"
    )
    return Table(caption, ["optimizer", *factors, "inside"], cells)


# -- figures ---------------------------------------------------------------------------


def curves_figure(rows: Rows) -> Any:
    """The median loss of the seeds, a panel a task."""
    learned = [label for label in rows if label not in OPTIMIZERS]
    panels: dict[str, dict[str, plots.Losses]] = {}
    for task, about in TASKS.items():
        steps = np.linspace(0, about.num_steps, RECORDS + 1)
        for label, of in rows.items():
            if task in of:
                middle = np.median(of[task].curves, 0, keepdims=True)
                panels.setdefault(task, {})[label] = plots.Losses(steps, middle)
    figure = plots.loss_panels(panels, learned=learned, columns=5)
    for axes in figure.axes:
        _plain_ticks(axes.yaxis)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Few numbers without exponents, of a log axis."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def ratios_figure(rows: Rows) -> Any:
    """A dot for each task, the IQM over them with its interval."""
    from metalstm.plots.style import add_grid_and_legend, add_note, new_figure

    reference = rows[REFERENCE]
    labels = [label for label in rows if label != REFERENCE]
    figure = new_figure((7, 0.6 * len(labels) + 1.8))
    axes = figure.subplots()
    styles = plots.method_styles(TASKS)
    shown = lambda x: np.clip(x, *_SHOWN)  # noqa: E731
    in_legend: set[str] = set()
    for y, label in enumerate(labels):
        tasks = [task for task in rows[label] if task in reference]
        mine, base = (
            np.stack([of[task].curves[:, -1] for task in tasks])
            for of in (rows[label], reference)
        )
        ratios = np.median(mine, 1) / np.median(base, 1)
        for task, value, shift in zip(
            tasks, ratios, np.linspace(-0.3, 0.3, len(tasks)), strict=True
        ):
            style = styles[task] | {"linestyle": "", "markersize": 6}
            named = None if task in in_legend else task
            in_legend.add(task)
            axes.plot(shown(value), y + shift, label=named, **style)
        axes.plot(shown(iqm_interval(mine, base)), (y, y), color="black", linewidth=1.5)
        axes.plot(shown(iqm(ratios)), y, "|", color="black", markersize=16)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set(xscale="log", xlabel="last loss / tuned AdamW's", ylim=(len(labels), -1))
    axes.set_yticks(range(len(labels)), labels)
    _plain_ticks(axes.xaxis)
    add_grid_and_legend(axes)
    said = "a dot a task; line: interquartile mean and its 95% interval"
    add_note(figure, f"{said}; what is outside {_SHOWN} is drawn at its ends")
    return figure


def report(folder: Path, into: Path | None) -> str:
    """The tables of what is there; with ``into`` written there, with figures.

    Args:
      folder: of the cells; if there are none, the losses are those of a held_out.json
        in ``into``.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: one is damaged, or held_out.json has cells that ``folder`` lacks.
    """
    found, path = read_cells(folder), into and into / "held_out.json"
    written = read_document(path) if path and path.exists() else {}
    if not (found or written):
        raise FileNotFoundError(f"{folder} has no cells: run the test first")
    found = found or written
    if lost := names_of(written) - names_of(found):
        raise ValueError(
            f"{path} has {len(lost)} cells that {folder} lacks, such as {min(lost)}: "
            "choose another --report, or delete the file"
        )
    rows, missing = rows_of(found)
    made = tables(rows, missing)
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
        write_json(into / "held_out.json", to_json(found))
        with atomic_write(into / "held_out.md") as part:
            part.write_text("\n".join(table.markdown() for table in made))
        if rows:
            save_figure(curves_figure(rows), into / "held_out_curves.png")
        if len(rows) > 1 and REFERENCE in rows:
            save_figure(ratios_figure(rows), into / "held_out_ratios.png")
    return "\n\n".join(map(str, made))
