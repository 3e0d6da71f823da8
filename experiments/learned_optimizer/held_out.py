"""The held-out test of a rule for ordinary training, cell by cell.

Claim: with its default a gate rule ends lower than AdamW with a tuned rate and schedule
on most of ten tasks whose data and architectures it was not trained on.

    python -m experiments.learned_optimizer.held_out --data-dir DIR --rule FILE.npz
    python -m experiments.learned_optimizer.held_out --report FOLDER

Every optimizer has the same nine trials for each task, on another seed than is
reported: the rate moves by factors of sqrt(10) from its default, with a cosine, until
the best has a worse neighbour on both sides (seven trials at most); the last ones try
the best rate at other schedules. Where the best of the nine is at an edge of the rates
tried, more follow beyond it (15 trials at most). A gate rule has one trial, its default
(row "NAME"), and nine, in which its updates are multiplied (row "NAME, tuned"). Then
three seeds are trained with the best trial. A cell is one training run, a JSON file in
the folder; cells that are there are not run again, so the command may be stopped at any
time. A rule's cells go by its file's name, and a rule that is not the one they were run
with is refused. The report says what is missing, and compares what is complete.

About four hours of one core for all tasks, the five optimizers and one rule, by the
milliseconds of a step; `--tasks` and `--optimizers` choose.
docs/results/learned_optimizers.md has the results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.cli import Names, Options, parse
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status

MODULE = "experiments.learned_optimizer.held_out"


class Config(Options, frozen=True):
    data_dir: Path = Path("data")
    """Has mini_imagenet and tensorflow_datasets."""
    folder: Path = Path("runs") / "held_out"
    """Where the cells are."""
    rule: tuple[Path, ...] = ()
    """Files of trained rules, rows of their own by the files' names."""
    fallback: bool = False
    """Also a row "NAME, fallback" of each rule: its default, with the fallback."""
    tasks: Names = ()
    """Which tasks; none named: all."""
    optimizers: Names = ()
    """Which optimizers to compare with, likewise."""
    sensitivity: bool = False
    """Run also other rates: the tuned one (a rule's default) times 10^-1.5 to 10^1.5,
    one seed each."""
    report: Path | None = None
    """Run nothing; write the tables of what is there, the figures and held_out.json, of
    which they can be made again, into this folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    said = "stopped; the same command runs what is missing"
    return exit_status(_run, arguments, stopped=lambda: said)


def _run(arguments: list[str]) -> None:
    config = parse(Config(), arguments, module=MODULE, description=__doc__)
    keep_compiled_programs()
    from experiments.learned_optimizer import held_out_cells, held_out_report

    if config.report is None:
        held_out_cells.run(*held_out_cells.resolved(config))
    print(held_out_report.report(config.folder, config.report))


if __name__ == "__main__":
    sys.exit(main())
