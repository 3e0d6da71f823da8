"""One table for every command: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from metalstm.runtime.files import atomic_write

__all__ = ["WIDTH", "Table"]

WIDTH = 110  # columns of a terminal


class Table(NamedTuple):
    """Cells to be read by people, and the values behind them for programs."""

    caption: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Any]] = ()  # of the CSV, one a row
    notes: Sequence[str] = ()  # one paragraph each
    left: Sequence[int] = (0,)  # columns that are aligned to the left

    @classmethod
    def of(
        cls,
        caption: str,
        columns: Mapping[str, str],
        records: Iterable[Mapping[str, Any]],
        **more: Any,
    ) -> Table:
        """Fill each column's format, by heading, from a record's values.

        A cell is empty if the record lacks what its format names.
        """

        def cell(style: str, record: Mapping[str, Any]) -> str:
            try:
                return style.format_map(record)
            except KeyError:
                return ""

        cells = [[cell(style, one) for style in columns.values()] for one in records]
        return cls(caption, [*columns], cells, **more)

    def __str__(self) -> str:
        lines = [textwrap.fill(self.caption, WIDTH)] if self.caption else []
        text = self._formatted("plain", [self.headings, *self.cells])
        lines += ["  " + line.rstrip() for line in text.splitlines()]
        return "\n".join(lines + [_wrapped(note) for note in self.notes])

    def markdown(self) -> str:
        # "*" and "~" would otherwise be markup
        table = _escaped(self._formatted("pipe", self.cells, headers=self.headings))
        notes = [_escaped(note) for note in self.notes]
        return "\n\n".join([self.caption, table, *notes]) + "\n"

    def write(self, folder: Path, stem: str = "table") -> list[str]:
        """Write STEM.md and STEM.csv completely or not at all; return their names."""
        with atomic_write(folder / f"{stem}.md") as part:
            part.write_text(self.markdown())
        with (
            atomic_write(folder / f"{stem}.csv") as part,
            open(part, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, list(self.records[0]))
            writer.writeheader()
            writer.writerows(self.records)
        return [f"{stem}.md", f"{stem}.csv"]

    def _formatted(
        self, style: str, rows: Sequence[Sequence[str]], headers: Sequence[str] = ()
    ) -> str:
        columns = range(len(self.headings))
        return tabulate(
            rows,
            headers,
            tablefmt=style,
            colalign=["left" if column in self.left else "right" for column in columns],
            disable_numparse=True,
        )


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("~", r"\~")


def _wrapped(note: str) -> str:
    return textwrap.fill(
        note,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    )
