"""The least time that a chip needs for a program's arithmetic and memory traffic.

    python -m benchmarks.tpu_limits [--markdown]

Closed forms; nothing is compiled, and no TPU is needed. The parts of an episode are
those of `benchmarks.roofline`, at a TPU's limits instead of measured ones:

- a matrix unit multiplies tiles of 128 x 128 numbers (v6e: 256 x 256). What does not
  fill a tile takes as long as if it did: few channels reach a small part of the peak.
- the memory (HBM) reads and writes every activation once for each pass. A program that
  keeps some of them on the chip needs less.

A part takes the longer of its two times, and the program their sum, "at least": nothing
is counted for small operations, changes of layout and the sums of norms. "matrix at
most" is the share of the matrix units' peak that this leaves.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from benchmarks.tpu_programs import CHIPS, PROGRAMS, Chip, gflop

__all__ = ["Bound", "ChipLimits", "bound"]


class Bound(NamedTuple):
    """Milliseconds of an episode."""

    arithmetic: float
    memory: float
    at_least: float  # of each part the longer one
    matrix_share: float  # of the peak, were the program as fast as that


class ChipLimits:
    """What `benchmarks.roofline.Machine` measures, of a chip by its data sheet."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.probe = 1e-9 * chip.flops * chip.hertz
        self.bandwidth = self.cache_bandwidth = 1e-9 * chip.bandwidth
        self.tanh = 1e-9 * 8 * 128 * chip.hertz  # one a lane and cycle
        self.normals = math.inf  # not counted

    def product(self, rows: int, inner: int, columns: int) -> float:
        """GFLOP/s of [rows, inner] by [inner, columns]; either may stand still."""
        side = self.chip.side
        padded = (
            _up(inner, side) * _up(fixed, side) * max(_up(passing, 8), side)
            for fixed, passing in ((columns, rows), (rows, columns))
        )
        return self.probe * rows * inner * columns / min(padded)

    def products(self, count: int, rows: int, inner: int, columns: int) -> float:
        """GFLOP/s of ``count`` such products."""
        return self.product(rows, inner, columns)

    def convolution(self, images, pixels, channels, filters, strides) -> float:
        """GFLOP/s of a 3x3 convolution, with the number of neighbouring pixels in one
        product that fills the unit best."""
        out = -(-pixels // strides)
        best = 0.0
        for together in range(1, 9):
            columns = 3 * (strides * (together - 1) + 3) * channels
            rows = images * out * -(-out // together)
            # of the packed kernel's numbers the rest is zero
            useful = 9 * channels * out / (-(-out // together) * columns)
            speed = self.product(rows, columns, together * filters)
            best = max(best, speed * useful / together)
        return best


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def bound(name: str, chip: str) -> Bound:
    """The least time of a program of `benchmarks.tpu_programs`, by its parts."""
    from benchmarks import roofline

    program, limits = PROGRAMS[name], ChipLimits(CHIPS[chip])
    parts_of = roofline.episode_parts
    if "problem" in program.row:
        parts_of = roofline.optimizer_parts
    parts = parts_of(limits, program.row)
    at_least = sum(part.seconds for part in parts)
    return Bound(
        1e3 * sum(part.compute for part in parts),
        1e3 * sum(part.memory for part in parts),
        1e3 * at_least,
        gflop(program) / at_least / limits.probe,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="a table for the docs")
    markdown = parser.parse_args().markdown
    head = ["program", "chip", "arithmetic ms", "memory ms", "at least ms"]
    table = [[*head, "matrix at most"]]
    for chip in CHIPS:
        for name in PROGRAMS:
            found = bound(name, chip)
            times = [f"{ms:.3f}" for ms in found[:3]]
            table.append([name, chip, *times, f"{found.matrix_share:.0%}"])
    for index, cells in enumerate(table):
        if markdown:
            print("| " + " | ".join(cells) + " |")
            print("|---" * len(cells) + "|\n" if not index else "", end="")
        else:
            print(f"{cells[0]:30}" + "".join(f"{cell:>15}" for cell in cells[1:]))


if __name__ == "__main__":
    main()
