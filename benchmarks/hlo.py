"""What a compiled program says of itself: cycles, collectives, sizes, from its text.

The TPU compiler writes its own estimate of cycles at each operation of the optimised
HLO. Here they are added up, an operation in a loop as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "COLLECTIVES",
    "Operation",
    "array_bytes",
    "collectives",
    "operations",
    "rank",
    "without_estimate",
]

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# what takes no time of its own: names, memory, and copies in the background
_FREE = (
    "bitcast",
    "constant",
    "copy-done",
    "copy-start",
    "custom-call",  # of these programs: memory for what a loop writes
    "dynamic-update-slice",
    "get-tuple-element",
    "parameter",
    "tuple",
)
_BITS = re.compile(r"(?:pred|[a-z]+(\d+))")
_SHAPE = re.compile(r"\b(pred|[subf]\d+|bf16|c64|c128|f8\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(
    r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


class Operation(NamedTuple):
    """One instruction of the program, all its executions together."""

    name: str  # in the compiled program
    kind: str  # its operation: fusion, copy, convolution, ..
    shape: str  # of its result, the layout included
    source: str  # the end of the path of the traced operation
    times: int  # how often it runs
    cycles: int  # estimated, of all runs together

    def __str__(self) -> str:
        shape = self.shape if len(self.shape) < 60 else self.shape[:57] + "..."
        return f"{self.name} x{self.times} {shape} {self.source}"


def operations(text: str) -> list[Operation]:
    """Return every instruction that runs on its own, those within a fusion not.

    A loop whose number of rounds the compiler does not know counts once. Of a
    conditional's branches the costliest counts.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header.group(2)
            found[name] = []
            entry = name if header.group(1) else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    if not entry:
        raise ValueError("this is no program in HLO's text form: it has no ENTRY")
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int
) -> Iterator[Operation]:
    for line in computations[name]:
        matched = _INSTRUCTION.match(line)
        if not matched:
            continue
        instruction, shape, kind = matched.groups()
        if kind == "while":
            body, condition = (
                re.search(rf"{part}=%?([\w.\-]+)", line).group(1)  # type: ignore[union-attr]
                for part in ("body", "condition")
            )
            rounds = _rounds(computations[condition])
            yield from _walk(computations, body, times * rounds)
            continue
        if kind in ("call", "conditional", "async-start"):
            called = [list(_walk(computations, c, times)) for c in _called(line)]
            if called:
                yield from max(called, key=lambda ops: sum(op.cycles for op in ops))
                continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        source = re.search(r'op_name="([^"]*)"', line)
        yield Operation(
            instruction,
            kind,
            shape,
            "/".join(source.group(1).split("/")[-2:]) if source else "",
            times,
            times * int(cycles.group(1)) if cycles else 0,
        )


def _rounds(condition: list[str]) -> int:
    """How often a loop runs: JAX's loops count from 0 to a constant of the condition.

    One that ends otherwise counts once.
    """
    limits = [re.search(r" constant\((\d+)\)", line) for line in condition]
    return max((int(limit.group(1)) for limit in limits if limit), default=1)


def _called(line: str) -> list[str]:
    names: list[str] = []
    for one, several in _CALLS.findall(line):
        names += [one] if one else [n.strip(" %") for n in several.split(",")]
    return names


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, without padding.

    >>> array_bytes("(f32[2,3]{1,0:T(8,128)}, u8[5]{0})")
    29
    """
    total = 0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = _BITS.match(dtype)
        width = int(bits.group(1) or 8) if bits else 8
        total += math.prod(int(n) for n in sizes.split(",") if n) * width // 8
    return total


def rank(shape: str) -> int:
    """How many axes an array has, or of a tuple the one with the most.

    >>> rank("(f32[2,3]{1,0}, u8[5]{0})")
    2
    """
    found = [sizes.count(",") + bool(sizes) for _, sizes in _SHAPE.findall(shape)]
    return max(found, default=0)


def collectives(found: list[Operation]) -> dict[str, tuple[int, int]]:
    """Return how many of each collective run, and the bytes of their results."""
    totals: dict[str, tuple[int, int]] = {}
    for op in found:
        kind = op.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            size = array_bytes(op.shape) // (2 if op.kind.endswith("-start") else 1)
            number, so_far = totals.get(kind, (0, 0))
            totals[kind] = (number + op.times, so_far + op.times * size)
    return totals


def without_estimate(found: list[Operation]) -> int:
    """Bytes that operations write for which the compiler has no estimate.

    Collectives are not among them.
    """
    return sum(
        op.times * array_bytes(op.shape)
        for op in found
        if not op.cycles and op.kind not in _FREE
        if op.kind.removesuffix("-start").removesuffix("-done") not in COLLECTIVES
    )
