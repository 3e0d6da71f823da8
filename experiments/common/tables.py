"""The table of a comparison: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.few_shot.options import Config
from experiments.few_shot.published import Beside, beside, legend
from metalstm.meta.evaluation import Evaluation, paired_difference
from metalstm.runtime.files import atomic_write

REFERENCE = "meta-lstm"  # what the others are compared with, where it is
WIDTH = 110  # columns of a terminal


class Row(NamedTuple):
    """One line. Accuracies are in [0, 1], published ones in %."""

    name: str
    mean: float
    ci95: float
    difference: tuple[float, float] | None  # mean and half-interval, paired
    batch_norm: str | None
    learned: int  # numbers
    episodes: int | None = None  # of meta-training
    seconds: float | None = None
    published: Beside | None = None

    def values(self) -> dict[str, Any]:
        """For JSON and CSV: plain values under names that say their unit."""
        number = self.published and self.published.number
        difference = self.difference or (None, None)
        return {
            "name": self.name,
            "mean": self.mean,
            "ci95": self.ci95,
            "difference": difference[0],
            "difference_ci95": difference[1],
            "published_percent": number and number.value,
            "published_ci95_percent": number and number.ci95,
            "published_by": number and number.source,
            "published_marks": self.published and marks_of(self.published),
            "batch_norm": self.batch_norm,
            "learned": self.learned,
            "meta_training_episodes": self.episodes,
            "meta_training_seconds": self.seconds,
        }


class Tested(NamedTuple):
    """A method's test, before it is set beside the others."""

    name: str  # as the table has it
    method: str
    evaluation: Evaluation
    batch_norm: str | None
    learned: int
    meta_training: Mapping[str, Any]  # what results.json has of it, or nothing


def rows_of(
    tested: Sequence[Tested], config: Config, compared_to: Callable[[Tested], str]
) -> list[Row]:
    """A row for each, with its paired difference to the row named ``compared_to``."""
    by_name = {one.name: one.evaluation for one in tested}
    rows = []
    for one in tested:
        to, difference = compared_to(one), None
        if one.name != to:
            difference = paired_difference(one.evaluation, by_name[to])
        rows.append(
            Row(
                one.name,
                one.evaluation.mean,
                one.evaluation.ci95,
                difference,
                one.batch_norm,
                one.learned,
                one.meta_training.get("episodes"),
                one.meta_training.get("wall_seconds"),
                published_beside(one.method, config, one.batch_norm),
            )
        )
    return rows


class Table(NamedTuple):
    caption: str
    rows: Sequence[Row]

    def __str__(self) -> str:
        lines = [textwrap.fill(self.caption, WIDTH)]
        cells = [_HEADINGS, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            parts = [
                f"{cell:<{width}}" if index in _LEFT else f"{cell:>{width}}"
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(parts)).rstrip())
        lines += [_note(line) for line in self.legend()]
        return "\n".join(lines)

    def markdown(self) -> str:
        rule = [":--" if index in _LEFT else "--:" for index in range(len(_HEADINGS))]
        rows = [_HEADINGS, rule, *map(_cells, self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        # one paragraph a line: "*" and "~" would otherwise be markup
        notes = [line.replace("*", r"\*").replace("~", r"\~") for line in self.legend()]
        lines = [line.replace("*", r"\*").replace("~", r"\~") for line in lines]
        return "\n\n".join([self.caption, "\n".join(lines), *notes]) + "\n"

    def legend(self) -> list[str]:
        return list(legend({r.name: r.published for r in self.rows if r.published}))

    def write(self, folder: Path, stem: str = "table") -> list[str]:
        """Write STEM.md and STEM.csv whole, or nothing; return their names."""
        with atomic_write(folder / f"{stem}.md") as part:
            part.write_text(self.markdown())
        with (
            atomic_write(folder / f"{stem}.csv") as part,
            open(part, "w", newline="") as f,
        ):
            values = [row.values() for row in self.rows]
            writer = csv.DictWriter(f, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
        return [f"{stem}.md", f"{stem}.csv"]


_HEADINGS = [
    "method", "accuracy, %", "difference", "published", "batch norm", "learned",
    "episodes", "seconds",
]  # fmt: skip
_LEFT = (0, 3, 4)


def _cells(row: Row) -> list[str]:
    difference = ""
    if row.difference is not None:
        mean, ci95 = row.difference
        difference = f"{100 * mean:+.1f} ± {100 * ci95:.1f}"
    return [
        row.name,
        f"{100 * row.mean:.1f} ± {100 * row.ci95:.1f}",
        difference,
        str(row.published or ""),
        row.batch_norm or "-",
        f"{row.learned:,}",
        "-" if row.episodes is None else f"{row.episodes:,}",
        "-" if row.seconds is None else f"{row.seconds:,.0f}",
    ]


def _note(line: str) -> str:
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )


def marks_of(number: Beside) -> str:
    return "".join(mark for mark in str(number) if mark in "*~?")


def reference_of(names: Sequence[str]) -> str:
    """Whom the others are compared with: Meta-LSTM, or else the first."""
    return REFERENCE if REFERENCE in names else names[0]


def caption(what: str, reference: str) -> str:
    return (
        f"{what}; accuracy with its 95% CI, difference: paired, to {reference}; "
        "episodes and seconds: of meta-training, validation included"
    )


def published_beside(
    method: str, config: Config, batch_norm: str | None
) -> Beside | None:
    data = config.data
    return beside(
        method,
        dataset=data.dataset,
        split=data.split,
        way=data.way,
        shot=data.shot,
        batch_norm=batch_norm,
    )


def batch_norm_of(spec: Mapping[str, Any], mode: str | None) -> str | None:
    """How a method's queries are normalised; None: it has no batch norm."""
    learner = spec.get("learner")
    if learner is None or learner["name"] == "mlp":
        return None
    return mode if learner["options"].get("norm", "batch") == "batch" else None
