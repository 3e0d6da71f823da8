"""Learn an optimizer by gradient descent, compare it with tuned hand-made ones.

Claims: an LSTM that reads one coordinate's gradients learns to optimize a family of
problems better than SGD, RMSprop, Adam and Nesterov with tuned rates (Andrychowicz et
al., 2016); a memory of gradients chained into gates joins it with the Meta-LSTM.

    python -m experiments.learned_optimizer                   # quadratics, no download
    python -m experiments.learned_optimizer --preset mnist-mlp --data-dir DIR
    python -m experiments.learned_optimizer --rules l2l,v2,meta-lstm,gates
    python -m experiments.learned_optimizer --evaluate RUN --study generalisation
    python -m experiments.learned_optimizer --evaluate RUN --study panels --quadratics-run RUN2

docs/results/learned_optimizers.md has the tables, with the commands, the hardware and
the time they took.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status, what_is_kept
from experiments.learned_optimizer.command_line import may_change, other_flags, parse
from experiments.learned_optimizer.options import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int:
        nonlocal folder
        config = parse(arguments)
        keep_compiled_programs()
        devices.join(config.devices)
        from experiments.learned_optimizer import running

        if config.run.evaluate is not None:
            running.evaluate(config, other_flags(arguments))
            return 0
        folder = running.choose_folder(config)
        return _run(config, folder)

    return exit_status(body, arguments, stopped=lambda: what_is_kept(folder, _hint))


def _run(config: Config, folder: Path) -> int:
    from experiments.common.run_folder import locked, refuse_other_runs

    changeable = may_change(config)
    refuse_other_runs(folder, config, changeable)
    from experiments.common.script_end import Interrupted
    from experiments.learned_optimizer.running import run

    if devices.is_one_of_several():
        print(_hint(folder), flush=True)  # a process may die
    with locked(folder, config, changeable):
        try:
            run(config, folder)
        except Interrupted:
            print(f"stopped and saved; {_hint(folder)}")
            return 130
    return 0


def _hint(folder: Path) -> str:
    from experiments.common.report import resume_hint

    return resume_hint(folder, "experiments.learned_optimizer")


if __name__ == "__main__":
    devices.exit_with(main)
