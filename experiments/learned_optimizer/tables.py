"""Rows of results from curves, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.tables import Table
from metalstm.learned_optimizers import curves
from metalstm.plots import Losses
from metalstm.statistics import mean_and_ci95

if TYPE_CHECKING:
    from experiments.learned_optimizer.measuring import Choice

Row = dict[str, Any]


def rows_of(
    measured: Mapping[str, Losses],
    chosen: Mapping[str, Choice],
    *,
    at: int | None = None,
    reference: str | None = None,
) -> list[Row]:
    """One row an optimizer: its losses after update ``at`` (default the last).

    The columns are those of `metalstm.learned_optimizers.summary`; differences are
    paired, to ``reference`` (default the first). Those of logs cap a loss at 1000 times
    its first, so that they exist where a problem diverges, and no divergence is free.
    """
    reference = reference or next(iter(measured))
    index = {name: _index(losses, at) for name, losses in measured.items()}
    logs = {n: capped_logs(m.values, index[n]) for n, m in measured.items()}
    rows = []
    for name, losses in measured.items():
        values, k = losses.values, index[name]
        row: Row = {"optimizer": name, "updates": int(losses.steps[k])}
        row["instances"] = len(values)
        row |= curves.summary(values, k)._asdict()
        row["mean_log_ci95"] = mean_and_ci95(logs[name])[1]
        if name != reference:
            row["log_difference"] = mean_and_ci95(logs[name] - logs[reference])
            other = measured[reference].values
            if np.isfinite(values[:, k]).all() and np.isfinite(other[:, k]).all():
                difference = curves.curve_difference(values, other, k)
                row["difference"] = difference
        if name in chosen:
            choice = chosen[name]
            row |= {"rate": choice.rate, "beta": choice.beta}
            row["inside"] = choice.tuned.inside["learning_rate"]
        rows.append(row)
    return rows


def table(
    rows: Sequence[Row], *, reference: str, caption: str = "", first: str = ""
) -> Table:
    """One line an optimizer; ``first`` names a column to put before the others."""
    names = [first] if first else []
    names += [
        "optimizer", "updates", "loss (95% CI)", "mean log", "median", "99%",
        "diverged", f"loss − {reference}", f"log-loss − {reference}", "tuned",
    ]  # fmt: skip
    cells = [[str(row[first])] if first else [] for row in rows]
    cells = [one + _cells(row) for one, row in zip(cells, rows, strict=True)]
    return Table(caption, names, cells, left=(0, 1) if first else (0,))


def grid(rows: Sequence[Row], *, row: str, column: str, caption: str) -> Table:
    """Mean losses with their intervals, one row a problem, one column an optimizer."""
    names = list(dict.fromkeys(r[column] for r in rows))
    found = {(r[row], r[column]): _mean(r) for r in rows}
    cells = [
        [title, *(found.get((title, name), "") for name in names)]
        for title in dict.fromkeys(r[row] for r in rows)
    ]
    return Table(caption, [row, *names], cells)


def _cells(row: Row) -> list[str]:
    return [
        row["optimizer"],
        f"{row['updates']:,}",
        _mean(row),
        f"{row['mean_log']:.2f} ± {row['mean_log_ci95']:.2f}",
        f"{row['median']:.3g}",
        f"{row['p99']:.3g}",
        _percent(row["share_diverged"]),
        _difference(row.get("difference"), ".3g"),
        _difference(row.get("log_difference"), ".2f"),
        _tuned(row),
    ]


def _mean(row: Row) -> str:
    if not np.isfinite(row["mean"]):
        return f"{_percent(row['share_diverged'])} diverge"
    return f"{row['mean']:.3g} ± {row['ci95']:.2g}"


def _difference(value: tuple[float, float] | None, digits: str) -> str:
    if value is None:
        return ""
    return f"{value[0]:+{digits}} ± {value[1]:{digits.replace('3', '2')}}"


def _tuned(row: Row) -> str:
    if "rate" not in row:
        return ""
    beta = "" if row["beta"] is None else f", beta {row['beta']:g}"
    edge = "" if row["inside"] else " (at the edge of the grid)"
    return f"rate {row['rate']:.3g}{beta}{edge}"


def _index(losses: Losses, at: int | None) -> int:
    if at is None:
        return len(losses.steps) - 1
    found = np.flatnonzero(losses.steps == at)
    if not len(found):
        raise ValueError(f"no loss was recorded after {at} updates: {losses.steps}")
    return int(found[0])


def capped_logs(losses: np.ndarray, at: int) -> np.ndarray:
    """Logs of column ``at`` of [I, S + 1], no loss above 1000 times its first."""
    losses = np.asarray(losses, np.float64)
    worst = 1e3 * losses[:, 0]
    last = np.where(losses[:, at] < worst, losses[:, at], worst)  # NaN is not below
    return np.log(np.maximum(last, np.finfo(np.float32).tiny))


def _percent(share: float) -> str:
    """0%, and no rounding of one problem in a thousand to it."""
    return f"{100 * share:.3g}%"
