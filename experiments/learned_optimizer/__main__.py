"""Learn an optimizer by gradient descent, compare it with tuned hand-made ones.

Claims: an LSTM that reads one coordinate's gradients learns to optimize a family of
problems better than SGD, RMSprop, Adam and Nesterov with tuned rates (Andrychowicz et
al., 2016); a memory of gradients chained into gates joins it with the Meta-LSTM.

    python -m experiments.learned_optimizer                   # quadratics, no download
    python -m experiments.learned_optimizer --preset mnist-mlp --data-dir DIR
    python -m experiments.learned_optimizer --rules l2l,v2,meta-lstm,gates
    python -m experiments.learned_optimizer --evaluate RUN --study generalisation
    python -m experiments.learned_optimizer --evaluate RUN --study panels --beside RUN2

docs/results/learned_optimizers.md has the tables, with the commands, the hardware and
the time they took.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status, what_is_kept
from experiments.learned_optimizer.options import Config, may_change, parse

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int:
        nonlocal folder
        config = parse(arguments)
        keep_compiled_programs()
        devices.join(config.devices)
        if config.run.evaluate is not None:
            from experiments.learned_optimizer.running import evaluate

            evaluate(config)
            return 0
        from experiments.learned_optimizer.running import choose_folder

        folder = choose_folder(config)
        return _run(config, folder)

    def stopped() -> str:
        return what_is_kept(folder, how_to_go_on)

    return exit_status(body, arguments, stopped=stopped, in_flags=_as_flags)


def _run(config: Config, folder: Path) -> int:
    from experiments.common.run_folder import locked, refuse_other_runs

    refuse_other_runs(folder, config, may_change(config))
    from experiments.common.stopping import Interrupted
    from experiments.learned_optimizer.running import run

    if devices.is_one_of_several():
        print(how_to_go_on(folder), flush=True)  # a process may die
    with locked(folder, config, may_change(config)):
        try:
            run(config, folder)
        except Interrupted:
            print(f"stopped and saved; {how_to_go_on(folder)}")
            return 130
    return 0


def how_to_go_on(folder: Path) -> str:
    return f"to resume: python -m experiments.learned_optimizer --resume {folder}"


# the library's names for what the flags call otherwise
_FLAGS = {
    "hidden_size": "hidden",
    "image_size": "train-image-size",
    "num_tasks": "tasks",
    "unroll_steps": "unroll",
}


def _as_flags(message: str) -> str:
    """Say the library's arguments in flags: 'unroll_steps=0' as '--unroll 0'."""
    names = "|".join(_FLAGS)
    return re.sub(rf"\b({names})=", lambda m: f"--{_FLAGS[m[1]]} ", message)


if __name__ == "__main__":
    devices.exit_with(main)
