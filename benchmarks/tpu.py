"""What the TPU compiler says of the main programs. No TPU is needed: nothing runs.

    python -m benchmarks.tpu                              # all of them, one v5e chip
    python -m benchmarks.tpu maml --chip v6e --chips 1 16 # all that begin so
    python -m benchmarks.tpu --json FILE                  # and every figure in a file
    python -m benchmarks.tpu --check                      # fail where a promise broke

The compiler is pip install "jax[tpu]". Programs are whole meta-steps, with one task a
device unless the name has another number. One takes minutes of a core to compile.

"Mcycles" are millions of cycles that a device needs for one episode (of learned
optimizers, for a task's meta-step) by the compiler's own estimate, loops multiplied
out, and "ms" their time at the chip's clock; "at least ms" is what arithmetic and
memory traffic alone would take, by `benchmarks.tpu_limits`. What has no estimate counts
nothing: collectives, copies in the background, and operations that write "unestimated
MiB" for an episode. "drawing" is the share of sampling and augmentation, "matrix" the
share of the matrix units' bfloat16 peak that the episode's arithmetic, counted as in
`benchmarks.speed`, makes in this time. "arguments" and "temporaries" are a device's
memory. "exchange ms" is a model of what a step's collectives take, at the links'
published bandwidth and 1 us for each hop (ASSUMED). The same versions give the same
numbers each time; only seconds differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tpu_limits import bound
from benchmarks.tpu_programs import CHIPS, PROGRAMS, compile_program, start_compiler

__all__ = ["broken_promises"]

MIB = 2**20
COLUMNS = (
    "program",
    "chips",
    "Mcycles",
    "ms",
    "at least ms",
    "drawing",
    "matrix",
    "unestimated MiB",
    "arguments MiB",
    "temporaries MiB",
    "collectives: number, MiB",
    "exchange ms",
    "compile",
)
WIDTHS = (30, 9, 10, 9, 13, 10, 9, 17, 15, 17, 26, 13, 10)


def broken_promises(result: dict[str, Any]) -> list[str]:
    """What a compiled program does that none of ours should.

    It makes a copy of the pool, or exchanges more than the one mean over tasks.
    """
    broken = [f"a copy of the pool: {op}" for op in result["pool_copies"]]
    reduced = result["collectives"].get("all-reduce", (0, 0))[0]
    if reduced > 1:
        broken.append(f"{reduced} all-reduces, where one would do")
    others = sorted(set(result["collectives"]) - {"all-reduce"})
    return broken + [f"{result['collectives'][k][0]} of {k}" for k in others]


def _cells(result: dict[str, Any]) -> list[str]:
    exchanged = [
        f"{kind} {number}, {size / MIB:.2f}"
        for kind, (number, size) in sorted(result["collectives"].items())
    ]
    return [
        result["program"],
        f"{result['chips']} {result['chip']}",
        f"{result['cycles'] / 1e6:.3f}",
        f"{result['ms']:.3f}",
        f"{bound(result['program'], result['chip']).at_least:.3f}",
        f"{result['sampling_share']:.1%}",
        f"{result['matrix_share']:.1%}",
        f"{result['unestimated_bytes'] / MIB:.1f}",
        f"{result['arguments_bytes'] / MIB:.1f}",
        f"{result['temporaries_bytes'] / MIB:.1f}",
        "; ".join(exchanged) or "none",
        f"{result['exchange_ms']:.3f}",
        f"{result['compile_s']:.0f} s",
    ]


def _line(cells: Iterable[str], markdown: bool) -> str:
    if markdown:
        return "| " + " | ".join(cells) + " |"
    first, *rest = zip(cells, WIDTHS, strict=True)
    return f"{first[0]:{first[1]}}" + "".join(f"{c:>{w}}" for c, w in rest)


def _chosen(only: str) -> list[str]:
    """The program of this name, else all whose name begins so."""
    return [only] if only in PROGRAMS else [p for p in PROGRAMS if p.startswith(only)]


def _compiled(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import jax

    for name in _chosen(arguments.only):
        for chip in arguments.chip:
            for chips in arguments.chips:
                result, text = compile_program(name, chip, chips)
                if arguments.hlo is not None:
                    path = arguments.hlo / f"{name}_{chip}_{chips}.txt"
                    path.write_text(text)
                yield result
                jax.clear_caches()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "only", nargs="?", default="", help="a program, or how some begin"
    )
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=["v5e"])
    parser.add_argument(
        "--chips", nargs="+", type=int, choices=CHIPS["v5e"].topologies, default=[1]
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs")
    parser.add_argument("--markdown", action="store_true", help="a table for the docs")
    parser.add_argument(
        "--check", action="store_true", help="fail where a promise broke"
    )
    arguments = parser.parse_args()
    if not _chosen(arguments.only):
        parser.error(f"{arguments.only!r} begins none of {', '.join(PROGRAMS)}")
    start_compiler()
    if arguments.hlo is not None:
        arguments.hlo.mkdir(parents=True, exist_ok=True)
    results, broken = [], 0
    print(_line(COLUMNS, arguments.markdown), flush=True)
    if arguments.markdown:
        print(_line(["---"] * len(COLUMNS), True))
    for result in _compiled(arguments):
        results.append(result)
        print(_line(_cells(result), arguments.markdown), flush=True)
        if not arguments.markdown:
            for share, operation in result["costliest"]:
                print(f"    {share:6.1%}  {operation}", flush=True)
        if arguments.check:
            for what in broken_promises(result):
                broken += 1
                print(f"    broken: {what}", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
