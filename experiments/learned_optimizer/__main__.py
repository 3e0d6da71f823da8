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
from experiments.learned_optimizer.command_line import MODULE, other_flags, parse


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
        return running.run(config, folder)

    def stopped() -> str:
        from experiments.common.report import resume_hint

        return what_is_kept(folder, lambda kept: resume_hint(kept, MODULE))

    return exit_status(body, arguments, stopped=stopped)


if __name__ == "__main__":
    devices.exit_with(main)
