"""Rows of results from curves, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.tables import Table
from metalstm.learned_optimizers import curves
from metalstm.statistics import Estimate, mean_and_ci95

if TYPE_CHECKING:
    from experiments.learned_optimizer.measuring import Measured

Row = dict[str, Any]


def rows_of(measured: Sequence[Measured], reference: str | None = None) -> list[Row]:
    """One row an optimizer: its losses after the last update.

    The columns are those of `metalstm.learned_optimizers.summary`; differences are
    paired, to ``reference`` (default the first). Logs are
    `metalstm.learned_optimizers.capped_logs`, so that they exist where a problem
    diverges, and no divergence is free.
    """
    values = {one.optimizer.name: one.losses.values for one in measured}
    reference = reference or next(iter(values))
    base, rows = values[reference], []
    for optimizer, losses in measured:
        mine = losses.values
        row: Row = {"optimizer": optimizer.name, "updates": int(losses.steps[-1])}
        row |= {"instances": len(mine), **curves.summary(mine)._asdict()}
        row["mean_log"], row["mean_log_ci95"] = mean_and_ci95(curves.capped_logs(mine))
        if optimizer.name != reference:
            row["log_difference"] = curves.curve_difference(mine, base, log=True)
            if np.isfinite([mine[:, -1], base[:, -1]]).all():
                row["difference"] = curves.curve_difference(mine, base)
        if optimizer.tuned is not None:
            row["rate"] = optimizer.tuned.best["learning_rate"]
            row["inside"] = optimizer.tuned.inside["learning_rate"]
            row["beta"] = optimizer.beta
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
    difference, log_difference = row.get("difference"), row.get("log_difference")
    return [
        row["optimizer"],
        f"{row['updates']:,}",
        _mean(row),
        f"{Estimate(row['mean_log'], row['mean_log_ci95']):.2f}",
        f"{row['median']:.3g}",
        f"{row['p99']:.3g}",
        _percent(row["share_diverged"]),
        "" if difference is None else f"{difference:+.3g}",
        "" if log_difference is None else f"{log_difference:+.2f}",
        _tuned(row),
    ]


def _mean(row: Row) -> str:
    if not np.isfinite(row["mean"]):
        return f"{_percent(row['share_diverged'])} diverge"
    return f"{row['mean']:.3g} ± {row['ci95']:.2g}"


def _tuned(row: Row) -> str:
    if "rate" not in row:
        return ""
    beta = "" if row["beta"] is None else f", beta {row['beta']:g}"
    edge = "" if row["inside"] else " (at the edge of the grid)"
    return f"rate {row['rate']:.3g}{beta}{edge}"


def _percent(share: float) -> str:
    """0%, and no rounding of one problem in a thousand to it."""
    return f"{100 * share:.3g}%"
