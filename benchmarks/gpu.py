"""What a GPU makes of the main programs: one command of at most ten minutes.

    python -m benchmarks.gpu --out DIR                      # on a machine with a GPU
    python -m benchmarks.gpu --out DIR --recipes demo omniglot=DATA_DIR
    python -m benchmarks.gpu --out DIR --small --minutes 3  # tiny sizes, on any machine

Four parts, each in a process of its own and within its share of the time:

  limits    matrix products and memory, what the device reaches of its peak
  numerics  the meta-gradients of the main programs against the CPU's, in JAX's default
            precision (on a GPU TensorFloat-32), in float32 and in bfloat16
  speed     the rows of benchmarks.speed for 1, 16 and 4 seeds at once
  training  presets of experiments.few_shot, meta-trained and tested

``DIR/results.jsonl`` has a line for each row as soon as it is done, ``DIR/tables.md``
all of them: a run that is cut keeps what it did. A row that fails, or ends its process,
is noted, and the next one runs. With the same DIR again, rows that began are skipped.

"of the peak" is to the data sheet's, for the precision in use; `--peak` gives that of
a device that `benchmarks.gpu_rows.PEAKS` does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Results", "run_part"]

SHARES = {"limits": 1, "numerics": 3, "speed": 5, "training": 3}  # of the time
COLUMNS = {
    "limits": ("row", "measured", "of the peak"),
    "numerics": ("row", "default", "float32", "bfloat16"),
    "speed": ("row", "per s", "TFLOP/s", "of the peak", "GiB so far", "compile s"),
    "training": ("row", "episodes", "meta-training s", "accuracy, %"),
}
CAPTIONS = {
    "limits": "TFLOP/s of matrix products, GB/s of a copy",
    "numerics": "Relative difference of the meta-gradient to the CPU's in float32",
    "speed": "Episodes (learned optimizers: meta-steps) a second, all seeds together",
    "training": "Recipes of experiments.few_shot, first method of each",
}


class Results:
    """The rows of a folder: begun, done or failed."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, row: str, **figures: Any) -> None:
        """Note a row, with no figures that it has begun; write the tables again."""
        line = json.dumps({"part": part, "row": row, **figures})
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        (self.folder / "tables.md").write_text(self.tables())
        if figures:
            print(line, flush=True)

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        """The figures of each row that began, by name."""
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found: dict[str, dict[str, Any]] = {}
        for line in lines:
            figures = json.loads(line)
            if figures.pop("part") == part:
                found[figures.pop("row")] = figures
        return found

    def tables(self) -> str:
        """All rows as Markdown."""
        text = ""
        for part, columns in COLUMNS.items():
            found = self.rows(part)
            if not found:
                continue
            text += f"## {part}\n\n{CAPTIONS[part]}\n\n| {' | '.join(columns)} |\n"
            text += "|---" * len(columns) + "|\n"
            for name, figures in found.items():
                cells = [name, *(_cell(figures.get(c)) for c in columns[1:])]
                if set(figures) <= {"failed"}:
                    cells = [name, figures.get("failed", "did not end")]
                text += f"| {' | '.join(cells)} |\n"
            text += "\n"
        return text


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value or "-")


def run_part(
    results: Results, part: str, command: Sequence[str], seconds: float
) -> None:
    """Run ``command``, which measures the rows of ``part``, for at most so long.

    It is run again where a row ended it, for the rows after that one.
    """
    end = time.monotonic() + seconds
    while True:
        begun = len(results.rows(part))
        try:
            left = max(end - time.monotonic(), 0.1)
            status = subprocess.run(command, timeout=left, env=_environment())
        except subprocess.TimeoutExpired:
            results.add(part, "(the rest)", failed="the part's time was over")
            return
        if not status.returncode:
            return
        found = results.rows(part)
        why = f"the process ended with {status.returncode}"
        for row, figures in found.items():
            if not figures:
                results.add(part, row, failed=why)
        if len(found) == begun:
            results.add(part, "(the part)", failed=why)
            return


def _environment() -> dict[str, str]:
    """The CPU too, whose numbers are the reference."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen and "cpu" not in chosen:
        chosen += ",cpu"
    return os.environ | {"JAX_PLATFORMS": chosen}


def measure(results: Results, part: str, small: bool, peak: Any) -> None:
    """Measure the rows of a part that have not begun, in this process."""
    from benchmarks import gpu_rows

    for name, row in gpu_rows.rows_of(part, small, peak).items():
        if name in results.rows(part):
            continue
        results.add(part, name)
        try:
            figures = row()
        except Exception as error:  # whatever it is, the next row may do
            lines = str(error).splitlines() or [""]
            figures = {"failed": f"{type(error).__name__}: {lines[0]}"[:200]}
        results.add(part, name, **figures)


def train(results: Results, recipes: Sequence[str], small: bool, end: float) -> None:
    """Meta-train each recipe, PRESET or PRESET=DATA_DIR, for an equal time."""
    for index, recipe in enumerate(recipes):
        preset, _, data_dir = recipe.partition("=")
        seconds = (end - time.monotonic()) / (len(recipes) - index)
        if recipe in results.rows("training"):
            continue
        results.add("training", recipe)
        try:
            figures = _trained(preset, data_dir, small, max(seconds, 1))
        except subprocess.TimeoutExpired:
            figures = {"failed": "its time was over"}
        except (OSError, RuntimeError, KeyError) as error:
            figures = {"failed": str(error)[-200:]}
        results.add("training", recipe, **figures)


def _trained(preset: str, data_dir: str, small: bool, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.few_shot", "--preset", preset]
        command += ["--workdir", folder, "--algorithms", "meta-lstm"]
        # half of it is for compiling, validation and the test
        command += ["--minutes", f"{seconds / 120:.3f}", "--schedule", "constant"]
        command += ["--episodes", "1000000"]
        command += ["--data-dir", data_dir] if data_dir else []
        if small:
            command += ["--filters", "4", "--test-episodes", "16"]
            command += ["--validation-episodes", "8"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise RuntimeError(last[-1])
        document = json.loads((Path(folder) / "results.json").read_text())
    method = document["methods"]["meta-lstm"]
    return {
        "episodes": method["meta_training"]["episodes"],
        "meta-training s": method["meta_training"]["wall_seconds"],
        "accuracy, %": f"{100 * method['accuracy']:.1f} ± {100 * method['ci95']:.1f}",
        "device": document["device"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--minutes", type=float, default=10, help="of all together")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument(
        "--recipes", nargs="*", default=["demo"], help="presets, PRESET=DATA_DIR"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--peak",
        nargs=4,
        type=float,
        metavar=("BFLOAT16", "TF32", "FLOAT32", "GB/S"),
        help="the device's, in TFLOP/s and GB/s",
    )
    parser.add_argument("--measure", choices=SHARES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    results = Results(chosen.out)
    if chosen.measure:
        measure(results, chosen.measure, chosen.small, chosen.peak)
        return
    end = time.monotonic() + 60 * chosen.minutes
    own = sys.argv[1:] if arguments is None else list(arguments)
    for index, part in enumerate(chosen.parts):
        rest = sum(SHARES[p] for p in chosen.parts[index:])
        seconds = (end - time.monotonic()) * SHARES[part] / rest
        if part == "training":
            until = time.monotonic() + seconds
            train(results, chosen.recipes, chosen.small, until)
        else:
            command = [sys.executable, "-m", "benchmarks.gpu", "--measure", part, *own]
            run_part(results, part, command, seconds)
    print(f"\n{results.tables()}{chosen.out / 'tables.md'}")


if __name__ == "__main__":
    main()
