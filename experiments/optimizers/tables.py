"""Rows of results from curves, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.optimizers.measuring import Tuned
from metalstm.evaluation import mean_and_ci95
from metalstm.plots import Losses

Row = dict[str, Any]


def rows_of(
    measured: Mapping[str, Losses],
    tuned: Mapping[str, Tuned],
    *,
    at: int | None = None,
    reference: str | None = None,
) -> list[Row]:
    """One row an optimizer: its losses after update ``at`` (default the last).

    A loss that is not finite, or above 1000 times the first, has diverged. The mean and
    the 99th percentile are infinite when it is; the mean log, and differences of logs,
    count it as 1000 times the first loss, so that no divergence is free.
    """
    reference = reference or next(iter(measured))
    logs = {name: _log_losses(losses, at) for name, losses in measured.items()}
    rows = []
    for name, losses in measured.items():
        index = _index(losses, at)
        last = np.asarray(losses.values[:, index], np.float64)
        diverged = _diverged(losses, index)
        finite = np.where(diverged, np.inf, last)
        row: Row = {"optimizer": name, "updates": int(losses.steps[index])}
        row["instances"] = len(last)
        row["mean"], row["ci95"] = np.inf, np.nan
        if not diverged.any():
            row["mean"], row["ci95"] = mean_and_ci95(last)
        row["mean_log"], row["mean_log_ci95"] = mean_and_ci95(logs[name])
        row["median"] = float(np.median(finite))
        # "higher" never interpolates with an infinity
        row["p99"] = float(np.quantile(finite, 0.99, method="higher"))
        row["diverged"] = float(diverged.mean())
        if name != reference:
            difference = mean_and_ci95(logs[name] - logs[reference])
            row["log_difference"] = difference
            other = np.asarray(measured[reference].values[:, index], np.float64)
            if np.isfinite(last - other).all():
                row["difference"] = mean_and_ci95(last - other)
        if name in tuned:
            choice = tuned[name]
            row |= {"rate": choice.rate, "beta": choice.beta, "inside": choice.inside}
        rows.append(row)
    return rows


def markdown(rows: Sequence[Row], *, reference: str, first: str = "") -> str:
    """A table of rows; ``first`` names a column to put before the others."""
    names = [first] if first else []
    names += [
        "optimizer", "updates", "loss (95% CI)", "mean log", "median", "99%",
        "diverged", f"loss − {reference}", f"log-loss − {reference}", "tuned",
    ]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [str(row[first])] if first else []
        cells += _cells(row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grid(rows: Sequence[Row], *, row: str, column: str) -> str:
    """Mean losses with their intervals, one row a problem, one column an optimizer."""
    titles = list(dict.fromkeys(r[row] for r in rows))
    names = list(dict.fromkeys(r[column] for r in rows))
    cells = {(r[row], r[column]): _mean(r) for r in rows}
    lines = [f"| {row} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title in titles:
        values = [cells.get((title, name), "") for name in names]
        lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def text(rows: Sequence[Row], *, caption: str, reference: str) -> str:
    """The same for a terminal, with fewer columns."""
    head = (
        "optimizer", "loss (95% CI)", "median", "99%", "diverged",
        f"log-loss − {reference}", "tuned",
    )  # fmt: skip
    body = [[cells[i] for i in (0, 2, 4, 5, 6, 8, 9)] for cells in map(_cells, rows)]
    widths = [max(len(r[i]) for r in [head, *body]) for i in range(len(head))]
    lines = [
        "  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
        for r in [head, *body]
    ]
    return "\n".join([caption, *lines])


def _cells(row: Row) -> list[str]:
    return [
        row["optimizer"],
        f"{row['updates']:,}",
        _mean(row),
        f"{row['mean_log']:.2f} ± {row['mean_log_ci95']:.2f}",
        f"{row['median']:.3g}",
        f"{row['p99']:.3g}",
        f"{row['diverged']:.0%}",
        _difference(row.get("difference"), ".3g"),
        _difference(row.get("log_difference"), ".2f"),
        _tuned(row),
    ]


def _mean(row: Row) -> str:
    if not np.isfinite(row["mean"]):
        return f"{row['diverged']:.0%} diverge"
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


def _diverged(losses: Losses, index: int) -> np.ndarray:
    values = np.asarray(losses.values, np.float64)
    return ~(values[:, index] <= 1e3 * values[:, 0])


def _log_losses(losses: Losses, at: int | None) -> np.ndarray:
    index = _index(losses, at)
    values = np.asarray(losses.values, np.float64)
    worst = 1e3 * values[:, 0]
    last = np.where(_diverged(losses, index), worst, values[:, index])
    # float32 may reach zero exactly
    return np.log(np.maximum(last, 1e-38))
