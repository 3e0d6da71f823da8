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

from experiments.common import devices
from experiments.common.command import run_command
from experiments.learned_optimizer.command_line import MODULE, parse


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(MODULE, parse, arguments)


if __name__ == "__main__":
    devices.exit_with(main)
