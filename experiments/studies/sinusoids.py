"""Potential after training against performance now: regression of sinusoids.

Claim (Finn et al., 2017, section 5.1; Nichol et al., 2018, section 4): tasks are
y = A sin(x - p) with A ~ U(0.1, 5), p ~ U(0, pi). A network trained on all tasks at
once is the best answer before it has seen a task, since it predicts their mean, and
stays near it when it is fine-tuned; meta-learned ones are worse there and far better
after a few gradient steps.

    python -m experiments.studies.sinusoids                  # four methods, minutes
    python -m experiments.studies.sinusoids --preset demo    # two methods, under two minutes

One learner (MLP 40-40, ReLU) and one budget for all: the same meta-training tasks in
the same order, the same number of points of each. Every method's inner and outer rate
are chosen from twelve pairs on validation tasks, by the mean error over the updates
drawn. Then theta_0 is meta-trained again from several draws of its own initialisation,
all else being equal. docs/results/sinusoids.md has results, machine and time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.saved_options import did_you_mean
from experiments.common.small_study import check_ranges, parse, run_command

METHODS = {
    "maml": "theta_0 learned through SGD, second order",
    "fomaml": "the same, first order",
    "reptile": "theta_0 moves towards where SGD ends",
    "meta-sgd": "theta_0 and a rate for every parameter learned, second order",
    "meta-lstm": "theta_0 and gates that mix parameters and gradients, second order",
    "joint": "one network for all tasks together, then fine-tuned",
    "scratch": "not meta-trained: SGD from the initialisation",
}


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("maml", "fomaml", "reptile", "joint")
    """Which to compare, besides scratch, which is always there."""
    shot: int = 10
    """Points of a task that a method adapts to in meta-training; as many more judge."""
    test_shots: tuple[int, ...] = (10, 5)
    """Points that it adapts to at meta-test."""
    widths: tuple[int, ...] = (40, 40)
    """Units of the hidden layers."""
    inner_steps: int = 5
    """Updates in meta-training (reptile: --reptile-steps)."""
    reptile_steps: int = 10
    """Reptile's updates, each on --shot of the task's points."""
    test_steps: int = 10
    """Updates at meta-test."""
    hidden: int = 0
    """meta-lstm: units of its LSTM; 0: gates on features alone."""
    meta_steps: int = 4_000
    """Meta-steps of a final run."""
    tuning_steps: int = 500
    """Meta-steps of a trial of rates (joint: --meta-steps)."""
    tasks: int = 25
    """Tasks of a meta-step."""
    inits: int = 5
    """Draws of theta_0's own initialisation."""
    test_tasks: int = 1_000
    validation_tasks: int = 200
    seed: int = 0
    """Of meta-training and test tasks."""
    preset: str | None = None
    """demo: a look at it."""
    workdir: Path | None = None
    """The run folder; default runs/sinusoids. What is finished there is kept."""
    debug: bool = False
    """Show tracebacks."""


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "methods": ("fomaml", "joint"),
        "meta_steps": 1_000,
        "tuning_steps": 200,
        "inits": 2,
        "test_tasks": 600,
    },
}


def parse_arguments(arguments: list[str]) -> Config:
    """Read the flags.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    about = "; ".join(f"{name} ({what})" for name, what in METHODS.items())
    description = f"Error against gradient steps on sinusoids.\n\nMethods: {about}"
    config = parse("sinusoids", Config(), PRESETS, description, arguments)
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"--methods {name}: {did_you_mean(name, METHODS)}")
        if config.methods.count(name) > 1:
            raise ValueError(f"--methods names {name} twice: drop one")
    check_ranges(
        config, shot=1, test_shots=1, widths=1, inner_steps=1, reptile_steps=1,
        test_steps=1, hidden=0, meta_steps=1, tuning_steps=1, tasks=1, inits=2,
        test_tasks=2, validation_tasks=2, seed=0,
    )  # fmt: skip
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def load_runner():
        from experiments.studies.regression.study import run

        return run

    # each method has its own file in the run folder
    return run_command(
        "sinusoids", parse_arguments, load_runner, arguments, may_change=("methods",)
    )


if __name__ == "__main__":
    sys.exit(main())
