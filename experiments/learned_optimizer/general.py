"""Meta-train a gate rule for ordinary training, on a mixture of small problems.

Claim: gates that read normalised moments, meta-trained on small networks for an hour,
train networks of other kinds about as well as a tuned AdamW (`held_out`;
docs/results/learned_optimizers.md).

    python -m experiments.learned_optimizer.general --folder RUN    # or resume
    python -m experiments.learned_optimizer.general --folder RUN --export gates-v1.npz
    python -m experiments.learned_optimizer.general --evaluate fresh,gates-v1.npz \
      --validation-instances 8

A meta-step is one of evolution strategies on all families (`meta_tasks`): antithetic
pairs of perturbed rules each train a network from start to end, in runs of log-uniform
length, and the log of the last loss counts. First only the step size's weights and the
biases move: some thirty numbers, by which most can be gained. Every run has a scale of
its parameters, drawn once; most know their progress and length. Validation is on other
families: the mean log ratio of final losses to AdamW's with a tuned rate and a cosine,
below 0 where the rule ends lower. The best is kept, and written to RUN/gates.npz at the
end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from experiments.common.cli import (
    Count,
    Names,
    Natural,
    Options,
    Pair,
    Positive,
    check_range,
    parse,
)
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import locked
from experiments.common.script_end import Interrupted, exit_status

MODULE = "experiments.learned_optimizer.general"
_RESUME = "stopped; the same command resumes the run"


class Config(Options, frozen=True):
    folder: Path = Path("runs") / "general"
    """The run's; it is resumed if there is one. --evaluate keeps its results there."""
    export: Path | None = None
    """Train no further: write the best rule of the run so far to this file. The run may
    be under way."""
    evaluate: Names = ()
    """Train nothing: compare these files of rules on the validation families, each with
    the first. fresh: a rule that is not trained."""
    seed: Natural = 0
    """Of everything that is drawn."""
    rule: Literal["moment_gates", "moment_lstm", "moment_network"] = "moment_gates"
    """What is meta-trained."""
    orthogonal: bool = False
    """Whether it orthogonalises the updates of matrices."""
    normalise: bool = True
    """Whether the updates of a tensor have one length; of moment_gates."""
    hidden_size: Count = 8
    """Hidden units of the rule."""
    families: Names = ()
    """Which families to train on; none named: all."""
    validation_families: Names = ()
    """Which families to validate on, and --evaluate on; none named: all."""
    meta_steps: Count = 500
    """Meta-steps, over which the rate decays to 0 by a cosine."""
    linear_steps: Natural = 60
    """The first of them, in which the hidden units have no effect."""
    learning_rate: Positive = 0.15
    """Adam's, in units of the perturbations."""
    std: Positive = 0.1
    """Of the perturbations."""
    num_pairs: Count = 4
    """Pairs of runs of a family and meta-step; of costly families half as many."""
    estimator: Literal["runs", "pes", "backprop"] = "runs"
    """Evolution over whole runs; or, a family a meta-step, persistent evolution
    strategies or back-propagation in segments of --segment updates."""
    segment: Count = 200
    """pes and backprop: updates of a meta-step."""
    horizon: tuple[int, int] = (200, 2500)
    """Between which the length of a run is drawn."""
    scaling: tuple[float, float] = (0.5, 2.0)
    """Between which the scale of a run's parameters is drawn."""
    tell_progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.85
    """Share of the runs that know their progress; 0: nor do those of validation."""
    tell_length: bool = True
    """Whether these know their length too, in validation as well."""
    noisy_data: bool = True
    """Whether images and tables are noisy copies, some labels drawn again."""
    antithetic: bool = True
    """Whether the two rules of a pair are shifted in opposite directions."""
    validation_steps: Count = 2_000
    """Updates of a validation run, whatever --horizon is."""
    validation_instances: Pair = 2
    """Runs of each family of validation."""
    validate_every: Count = 20
    """Meta-steps between validations."""
    save_every: Count = 5
    """Meta-steps between checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    return exit_status(_run, arguments, stopped=lambda: _RESUME)


def _run(arguments: list[str]) -> int:
    config = parse(Config(), arguments, module=MODULE, description=__doc__)
    check_range("--horizon", *config.horizon)
    check_range("--scaling", *config.scaling)
    keep_compiled_programs()
    from experiments.learned_optimizer import general_training, general_validation

    if config.export is not None:
        general_validation.export(config.folder, config.export)
        return 0
    if config.evaluate:
        print(general_validation.evaluate(config))
        return 0
    tasks = general_validation.chosen_training(config)
    validation = general_validation.chosen_validation(config)
    changeable, measured = general_training.MAY_CHANGE, "*validation-*.json"
    with locked(config.folder, config, changeable, flag="--folder", known=measured):
        try:
            general_training.run(config, tasks, validation)
        except Interrupted:
            print(_RESUME)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
