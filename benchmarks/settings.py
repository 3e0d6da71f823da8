"""The same meta-steps with other settings: how those for a CPU were chosen.

    python -m benchmarks.settings                 # a quarter of an hour
    python -m benchmarks.settings mini --rounds 5 # rows whose name contains the word

Each cell is a process of its own, and the settings are interleaved, so that other
programs slow all of them. Printed are the median rate and its ratio to the first
column's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

from benchmarks import episodes, learned_optimizers, rows

__all__ = ["TABLES", "Setting"]

_FUSION = "xla_cpu_experimental_ynn_fusion_type"
_SUMS, _PRODUCTS = "LIBRARY_FUSION_TYPE_REDUCE", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


class Setting(NamedTuple):
    """One way to run a row; None leaves the library's choice."""

    ynnpack: str | None = None  # what XLA gives to YNNPACK; "all": all it will take
    spare: bool | None = None  # `compilation.cores_to_spare`, to the convolution
    devices: bool = True  # False: one device, whatever the number of cores and tasks
    pages: bool = True  # large pages


class Table(NamedTuple):
    rows: tuple[str, ...]
    settings: dict[str, Setting]  # the first is what the library chooses


_ANY = {"YNNPACK: nothing": Setting(ynnpack=""), "small pages": Setting(pages=False)}
TABLES = {
    "one task, one device with all cores": Table(
        ("mini-1shot", "mini-5shot"),
        {
            "chosen": Setting(),
            "YNNPACK: all": Setting(ynnpack="all"),
            "YNNPACK: products, sums": Setting(ynnpack=f"{_PRODUCTS},{_SUMS}"),
            "convolution as on one core": Setting(spare=False),
        }
        | _ANY,
    ),
    "several tasks, or one that is shared, a device to each core": Table(
        (
            "maml-conv4-64-5steps",
            "quadratics-tbptt",
            "quadratics-pes",
            "mnist-mlp-tbptt",
            "mnist-mlp-pes",
        ),
        {
            "chosen": Setting(),
            "YNNPACK: sums": Setting(ynnpack=_SUMS),
            "one device": Setting(devices=False),
        }
        | _ANY,
    ),
}


def measure(row: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """Time a row in this process, which must not have started JAX."""
    from metalstm.nn import convolution
    from metalstm.runtime import compilation

    if setting.ynnpack is not None:
        options = {} if setting.ynnpack == "all" else {_FUSION: setting.ynnpack}
        compilation.compiler_options = lambda: options
    if setting.spare is not None:
        convolution.cores_to_spare = lambda: setting.spare
    if not setting.devices:
        rows.one_device_to_a_core = lambda *args, **kwargs: None
    module = episodes if row in episodes.ROWS else learned_optimizers
    return module.measure(row, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="rows containing this")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--seconds", type=float, default=5, help="timed, per process")
    parser.add_argument("--markdown", action="store_true", help="a table for the docs")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = {k: v for table in TABLES.values() for k, v in table.settings.items()}
    if arguments.cell:
        row, setting = arguments.cell
        print(json.dumps(measure(row, settings[setting], arguments.seconds)))
        return
    failed = 0
    for title, table in TABLES.items():
        wanted = [row for row in table.rows if arguments.only in row]
        if not wanted:
            continue
        print(f"\n{title}, per second\n")
        _line(("row", *table.settings), arguments.markdown)
        if arguments.markdown:
            _line(["---"] * (1 + len(table.settings)), arguments.markdown)
        for row in wanted:
            rates: dict[str, list[float]] = {name: [] for name in table.settings}
            for _ in range(arguments.rounds):
                for name, setting in table.settings.items():
                    command = ["-m", "benchmarks.settings", "--cell", row, name]
                    command += ["--seconds", str(arguments.seconds)]
                    result = rows.in_a_process(command, large_pages=setting.pages)
                    if "failed" in result:
                        print(f"{row}, {name}: {result['failed']}", file=sys.stderr)
                        failed += 1
                    else:
                        rates[name].append(result["rate"])
            medians = [median(values) if values else None for values in rates.values()]
            _line([row, *_cells(medians)], arguments.markdown)
    sys.exit(failed > 0)


def _cells(medians: list[float | None]) -> Iterable[str]:
    first, *rest = medians
    yield "-" if first is None else f"{first:.2f}"
    for value in rest:
        missing = value is None or first is None
        yield "-" if missing else f"{value:.2f} ({value / first:.2f}x)"


def _line(cells: Iterable[str], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(cells) + " |", flush=True)
    else:
        print("".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
