"""The table of a comparison: rows, paired differences, published references."""

from __future__ import annotations

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

    name: str
    mean: float
    ci95: float
    difference: tuple[float, float] | None  # mean and half-interval, paired
    batch_norm: str | None
    learned: int  # numbers
    episodes: int | None = None  # of meta-training
    seconds: float | None = None
    published: Reference | None = None

    def record(self) -> dict[str, Any]:
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
            "published_marks": self.published and self.published.marks,
            "batch_norm": self.batch_norm,
            "learned": self.learned,
            "meta_training_episodes": self.episodes,
            "meta_training_seconds": self.seconds,
        }

    def cells(self) -> list[str]:
        difference = ""
        if self.difference is not None:
            mean, ci95 = self.difference
            difference = f"{100 * mean:+.1f} ± {100 * ci95:.1f}"
        return [
            self.name,
            f"{100 * self.mean:.1f} ± {100 * self.ci95:.1f}",
            difference,
            str(self.published or ""),
            self.batch_norm or "-",
            f"{self.learned:,}",
            "-" if self.episodes is None else f"{self.episodes:,}",
            "-" if self.seconds is None else f"{self.seconds:,.0f}",
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
        list(legend({r.name: r.published for r in rows if r.published})),
        left=(0, 3, 4),
    )


def rows_of(
    tested: Sequence[Tested], data: Data, compared_to: Callable[[Tested], str]
) -> list[Row]:
    """A row for each, with its paired difference to the row named ``compared_to``."""
    by_name = {one.name: one.evaluation for one in tested}
    rows: list[Row] = []
    for name, method, evaluation, batch_norm, learned, meta_training in tested:
        to = compared_to(tested[len(rows)])
        rows.append(
            Row(
                name,
                evaluation.mean,
                evaluation.ci95,
                None if name == to else paired_difference(evaluation, by_name[to]),
                batch_norm,
                learned,
                meta_training.get("episodes"),
                meta_training.get("wall_seconds"),
                published_reference(method, data, batch_norm),
            )
        )
    return rows


def compared_with(names: Sequence[str]) -> str:
    """The method that the others are compared with: Meta-LSTM, or else the first."""
    return REFERENCE if REFERENCE in names else names[0]


def batch_norm_of(spec: Mapping[str, Any], mode: str | None) -> str | None:
    """How a method's queries are normalised; None: it has no batch norm."""
    learner = learner_spec(spec) or {}
    learner = learner.get("body", learner)
    return mode if learner.get("norm") == "batch" else None
