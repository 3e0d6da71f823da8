"""The progress bar of meta-training, and its speed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from metalstm.runtime import processes


class Stopwatch:
    """Counts a second, without compilation (the first report) and what is excluded."""

    def __init__(self) -> None:
        self._excluded = 0.0  # seconds
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    @contextmanager
    def excluding(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._excluded += time.monotonic() - begun

    def report(self, count: int) -> None:
        self._last = (time.monotonic() - self._excluded, count)
        self._first = self._first or self._last

    def speed(self) -> float:
        """Counts a second between the first report and now; nan before there are."""
        if self._first is None or self._last is None:
            return math.nan
        begun, from_count = self._first
        count = self._last[1]
        seconds = time.monotonic() - self._excluded - begun
        return (count - from_count) / seconds if count > from_count else math.nan


class ProgressBar:
    """On process 0 alone; in units of what is counted, or in seconds of a budget."""

    def __init__(
        self, name: str, unit: str, *, total: float, done: float, in_seconds: bool
    ):
        count = (
            "{n:.0f}/{total:.0f} s" if in_seconds else f"{{n:,}}/{{total:,}} {unit}s"
        )
        self._bar: Any = tqdm(
            total=total,
            initial=min(done, total),  # tqdm drops a total that is behind it already
            desc=f"meta-training {name}",
            bar_format=f"{{desc}}  {{bar:22}}  {count}  {{unit}}  eta {{remaining}}",
            ascii=" #",
            disable=not processes.is_main(),
            unit="compiling",  # the field of the format that tqdm leaves to us
            # a log file gets a line now and then, a terminal a smooth bar
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )
        self._most = 0.999 * total if in_seconds else total  # one beyond its end warns

    def update(self, done: float, speed: float, text: str) -> None:
        said = "compiled"
        if math.isfinite(speed):
            said = f"{speed:.1f}/s" if speed >= 10 else f"{speed:.2f}/s"
        self._bar.unit = f"{said}  {text}"
        self._bar.update(min(done, self._most) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
