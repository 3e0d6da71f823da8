"""What became of each trial, and the table of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """One fault: how often it was tried, and which trials did not survive."""

    fault: str
    means: str  # what it takes to survive
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def survived(self) -> int:
        return self.tried - len(self.lost)

    @contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """Count a trial; one that raises anything is lost."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            text = str(error).strip().splitlines()
            said = text[0][:300] if text else ""
            self.lost.append(f"{name}: {type(error).__name__}: {said}")


_COUNTS = ("tried", "survived")


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row for each fault, and a line for each trial that was lost."""
    lines = [
        "| fault | survives when | tried | survived | lost |",
        "|---|---|---:|---:|---:|",
    ]
    for o in outcomes:
        note = f"; {o.note}" if o.note else ""
        lines.append(
            f"| {o.fault}{note} | {o.means} | {o.tried} | {o.survived} | "
            f"{len(o.lost)} |"
        )
    tried, survived = (sum(getattr(o, n) for o in outcomes) for n in _COUNTS)
    lines.append(f"| all | | {tried} | {survived} | {tried - survived} |")
    lines += ["", *(f"- lost: {o.fault}: {one}" for o in outcomes for one in o.lost)]
    return "\n".join(lines).rstrip()


def require(condition: bool, what: str) -> None:
    """An assertion that stays under ``python -O``."""
    if not condition:
        raise AssertionError(what)
