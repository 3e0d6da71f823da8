"""Published accuracies, each with its protocol, next to ours in the table.

A number is comparable only under the same split and with batch statistics gathered the
same way: `published_reference` says in which of them one differs, and of what nothing
is known. The numbers are in published.toml.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.few_shot.options import Data


class Published(NamedTuple):
    value: float  # accuracy, %
    source: str
    split: str | None = None  # None: the source as read does not say
    transductive: bool | None = None  # batch norm reads the query batch; None: unknown
    ci95: float | None = None
    up_to: float | None = None  # sources differ: value is the least of theirs
    confirmed: bool = True  # False: quoted from memory, not read in the source


class Reference(NamedTuple):
    """A published number, and why it is not comparable with ours."""

    number: Published
    other: tuple[str, ...]  # in what its protocol differs
    unknown: tuple[str, ...]  # what its source does not say

    @property
    def marks(self) -> str:
        marks = "*" * bool(self.other) + "~" * bool(self.unknown)
        return marks + "?" * (not self.number.confirmed)

    def __str__(self) -> str:
        value, ci95, up_to = self.number.value, self.number.ci95, self.number.up_to
        digits = 2 if f"{value:.2f}"[-1] != "0" else 1
        text = f"{value:.{digits}f}"
        text += "" if up_to is None else f"-{up_to:.{digits}f}"
        text += "" if ci95 is None else f" ± {ci95:.2f}"
        return text + self.marks


# How a paper splits characters. Ours: background alphabets for meta-training,
# evaluation alphabets for the test ("alphabets"), or 1,100 / 100 / 423 ("characters").
_SPLITS = {
    "alphabets": "held-out alphabets",
    "characters": "1,100 / 100 / 423 characters",
}
_MINI_IMAGENET = "Ravi & Larochelle's"


@functools.cache
def read_published() -> dict[tuple[str, int, int], dict[str, tuple[Published, ...]]]:
    """(data set, way, shot) -> method -> numbers, the original first."""
    document = tomllib.loads(Path(__file__).with_name("published.toml").read_text())
    return {
        (dataset, int(way.split("-")[0]), int(shot.split("-")[0])): {
            name: tuple(Published(**number) for number in numbers)
            for name, numbers in methods.items()
        }
        for dataset, ways in document.items()
        for way, shots in ways.items()
        for shot, methods in shots.items()
    }


def published_reference(
    method: str, data: Data, batch_norm: str | None
) -> Reference | None:
    """The published number whose protocol is nearest to ours, or None.

    Args:
      batch_norm: how our queries were normalised.
    """
    of_data = read_published().get((data.dataset, data.way, data.shot), {})
    ours = _MINI_IMAGENET if data.dataset == "mini-imagenet" else data.split
    found = [
        _compared(number, ours, batch_norm == "transductive")
        for number in of_data.get(method, ())
    ]
    return min(found, key=lambda n: (len(n.other), len(n.unknown)), default=None)


def _compared(number: Published, split: str, transductive: bool) -> Reference:
    other, unknown = [], []
    if number.split is None:
        unknown.append("split")
    elif number.split != split:
        other.append(f"split {_SPLITS.get(number.split, number.split)}")
    if number.transductive is None:
        unknown.append("batch-norm mode")
    elif number.transductive != transductive:
        other.append("transductive" if number.transductive else "inductive")
    return Reference(number, tuple(other), tuple(unknown))


def legend(found: Mapping[str, Reference]) -> Iterator[str]:
    """Lines that explain the marks, and name the sources."""
    kinds = (
        ("* other protocol", lambda n: n.other),
        ("~ not stated", lambda n: n.unknown),
        ("? unconfirmed", lambda n: () if n.number.confirmed else ("quoted",)),
        ("published by", lambda n: (n.number.source,)),
    )
    for title, reasons_of in kinds:
        groups: dict[str, list[str]] = {}
        for name, number in found.items():
            for reason in reasons_of(number):
                groups.setdefault(reason, []).append(name)
        parts = [f"{reason} ({', '.join(names)})" for reason, names in groups.items()]
        if parts:
            yield f"{title}: {'; '.join(parts)}"
