"""The table of a comparison: rows, paired differences, published references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.tables import Table
from experiments.few_shot.options import Data
from experiments.few_shot.published import Reference, legend, published_reference
from metalstm.meta.evaluation import Evaluation, paired_difference
from metalstm.specs import learner_spec

REFERENCE = "meta-lstm"  # what the others are compared with, where it is


class Tested(NamedTuple):
    """A method's test, before it is compared with the others."""

    name: str  # as the table has it
    method: str
    evaluation: Evaluation
    batch_norm: str | None
    learned: int  # numbers
    meta_training: Mapping[str, Any]  # what results.json has of it, or nothing


class Row(NamedTuple):
    """One line. Accuracies are in [0, 1], published ones in %."""

    tested: Tested
    difference: tuple[float, float] | None  # mean and half-interval, paired
    published: Reference | None

    def record(self) -> dict[str, Any]:
        """For JSON and CSV: plain values under names that say their unit."""
        one, number = self.tested, self.published and self.published.number
        difference = self.difference or (None, None)
        return {
            "name": one.name,
            "mean": one.evaluation.mean,
            "ci95": one.evaluation.ci95,
            "difference": difference[0],
            "difference_ci95": difference[1],
            "published_percent": number and number.value,
            "published_ci95_percent": number and number.ci95,
            "published_by": number and number.source,
            "published_marks": self.published and self.published.marks,
            "batch_norm": one.batch_norm,
            "learned": one.learned,
            "meta_training_episodes": one.meta_training.get("episodes"),
            "meta_training_seconds": one.meta_training.get("wall_seconds"),
        }

    def cells(self) -> list[str]:
        one, spent = self.tested, self.tested.meta_training
        mean, ci95 = self.difference or (math.nan, math.nan)
        return [
            one.name,
            f"{100 * one.evaluation.mean:.1f} ± {100 * one.evaluation.ci95:.1f}",
            f"{100 * mean:+.1f} ± {100 * ci95:.1f}" if self.difference else "",
            str(self.published or ""),
            one.batch_norm or "-",
            f"{one.learned:,}",
            f"{spent['episodes']:,}" if "episodes" in spent else "-",
            f"{spent['wall_seconds']:,.0f}" if "wall_seconds" in spent else "-",
        ]


_HEADINGS = (
    "method", "accuracy, %", "difference", "published", "batch norm", "learned",
    "episodes", "seconds",
)  # fmt: skip


def table_of(what: str, reference: str, rows: Iterable[Row]) -> Table:
    rows = list(rows)
    caption = (
        f"{what}; accuracy with its 95% CI, difference: paired, to {reference}; "
        "episodes and seconds: of meta-training, validation included"
    )
    return Table(
        caption,
        _HEADINGS,
        [row.cells() for row in rows],
        [row.record() for row in rows],
        list(legend({r.tested.name: r.published for r in rows if r.published})),
        left=(0, 3, 4),
    )


def rows_of(
    tested: Sequence[Tested], data: Data, compared_to: Callable[[Tested], str]
) -> list[Row]:
    """A row for each, with its paired difference to the row named ``compared_to``."""
    by_name = {one.name: one.evaluation for one in tested}
    rows = []
    for one in tested:
        to, difference = compared_to(one), None
        if one.name != to:
            difference = paired_difference(one.evaluation, by_name[to])
        published = published_reference(one.method, data, one.batch_norm)
        rows.append(Row(one, difference, published))
    return rows


def compared_with(names: Sequence[str]) -> str:
    """The method that the others are compared with: Meta-LSTM, or else the first."""
    return REFERENCE if REFERENCE in names else names[0]


def batch_norm_of(spec: Mapping[str, Any], mode: str | None) -> str | None:
    """How a method's queries are normalised; None: it has no batch norm."""
    learner = learner_spec(spec) or {}
    learner = learner.get("body", learner)
    is_of_user = ":" in learner.get("learner", "")
    return mode if is_of_user or learner.get("norm") == "batch" else None
