"""Learn to learn from few examples: the Meta-LSTM and its baselines in one table.

Claim: a learned update rule with a learned start adapts to new classes from a few
images, above fixed rules and baselines (Ravi & Larochelle, ICLR 2017; Finn et al.,
2017).

    python -m experiments.few_shot                          # letters, no download
    python -m experiments.few_shot --preset omniglot --data-dir DIR
    python -m experiments.few_shot --preset ravi-5shot --data-dir DIR
    python -m experiments.few_shot --preset omniglot --data-dir DIR --algorithms all
    python -m experiments.few_shot --evaluate RUN --query-norm all
    python -m experiments.few_shot --evaluate RUN RUN2      # in one table
    python -m experiments.few_shot --help meta-lstm         # one method's own flags

docs/results/ has the tables, with the commands, the hardware and the time they took.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status, what_is_kept
from experiments.few_shot.command_line import parse, parse_evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.few_shot.options import Options

ROOT = Path("runs") / "few_shot"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int:
        nonlocal folder
        if "--evaluate" in (word.split("=")[0] for word in arguments):
            options, anew = parse_evaluation(arguments)
        else:
            options, anew = parse(arguments), None
        keep_compiled_programs()
        devices.join(options.devices)
        if anew is not None:
            from experiments.few_shot.test import evaluate_again

            evaluate_again(options, anew)
            return 0
        folder = choose_folder(options)
        from experiments.few_shot.running import run

        return run(options, folder)

    def stopped() -> str:
        from experiments.common.report import resume_hint

        return what_is_kept(folder, resume_hint)

    return exit_status(body, arguments, stopped=stopped)


def choose_folder(options: Options) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    from experiments.common.run_folder import free_folder

    run, data = options.run, options.data
    if chosen := run.resume or run.workdir:
        return chosen
    dataset = data.dataset.replace("tfds:", "").replace("/", "-")
    return free_folder(ROOT / f"{dataset}-{data.way}w{data.shot}s-{run.seed}")


if __name__ == "__main__":
    devices.exit_with(main)
