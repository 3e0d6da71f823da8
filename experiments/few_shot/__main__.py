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

from collections.abc import Sequence

from experiments.common import devices
from experiments.common.command import run_command
from experiments.few_shot.command_line import MODULE, parse


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(MODULE, parse, arguments)


if __name__ == "__main__":
    devices.exit_with(main)
