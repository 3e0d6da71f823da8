"""Rows of two checkouts of the project, their calls interleaved.

    python -m benchmarks.turns --against ../before mini-1shot maml-strided-64-1step

Each checkout has a process of its own, which compiles the row and then waits for its
turns, so that a busy minute is busy for both: their ratio shows a twentieth where rows
measured one after the other differ by a quarter. A row runs as its checkout has it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import rows

__all__ = ["seconds_in_turn"]

_READY = "ready"
_HERE = Path(__file__).resolve()


def seconds_in_turn(row: str, checkouts: Iterable[Path], rounds: int) -> list[list]:
    """For each checkout the seconds of a call of ``row``, round after round.

    Raises:
      SystemExit: the row did not start in one of them.
    """
    processes = []
    try:
        for checkout in checkouts:  # one compiles after another
            processes.append(_start(row, checkout))
            _heard(processes[-1], row, checkout)
        found: list[list] = [[] for _ in processes]
        for number in range(rounds):
            order = list(enumerate(processes))
            for index, process in order if number % 2 else reversed(order):
                process.stdin.write("\n")
                process.stdin.flush()
                seconds = process.stdout.readline()
                if not seconds:
                    sys.exit(f"{row}: a process ended, its last words are above")
                found[index].append(float(seconds))
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(row: str, checkout: Path) -> subprocess.Popen:
    environment = rows.LARGE_PAGES | os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, str(_HERE), "--row", row],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _heard(process: subprocess.Popen, row: str, checkout: Path) -> None:
    assert process.stdout is not None
    if not any(line.strip() == _READY for line in process.stdout):
        sys.exit(f"{row} of {checkout} did not start: its last words are above")


def _take_turns(step: Callable[[], Any], seconds: float) -> None:
    """In place of `rows.timed`: a call for every line that comes, and its seconds."""
    import jax

    del seconds
    for _ in range(2):
        jax.block_until_ready(step())
    print(_READY, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(step())
        print(time.perf_counter() - start, flush=True)
    sys.exit()


def _serve(row: str) -> None:
    from benchmarks import episodes, learned_optimizers

    rows.timed = _take_turns  # type: ignore[assignment]
    module = episodes if row in episodes.ROWS else learned_optimizers
    module.measure(row, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="names, such as mini-1shot")
    parser.add_argument("--against", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=10, help="calls of each")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        _serve(arguments.row)
        return
    if not arguments.rows or arguments.against is None:
        parser.error("give --against a checkout, and the rows to run")
    other = arguments.against.resolve()
    if not (other / "benchmarks" / "rows.py").exists():
        parser.error(f"--against {arguments.against} has no benchmarks/rows.py")
    print("milliseconds of a call, median (fastest), and the median of the ratios\n")
    print(f"{'row':28}{'against':>18}{'this':>18}{'times as fast':>15}")
    for row in arguments.rows:
        theirs, ours = seconds_in_turn(
            row, (other, _HERE.parent.parent), arguments.rounds
        )
        ratio = median(a / b for a, b in zip(theirs, ours, strict=True))
        cells = (f"{1e3 * median(x):.0f} ({1e3 * min(x):.0f})" for x in (theirs, ours))
        print(f"{row:28}" + "".join(f"{c:>18}" for c in cells) + f"{ratio:>15.2f}")


if __name__ == "__main__":
    main()
