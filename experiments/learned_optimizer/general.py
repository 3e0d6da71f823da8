"""Meta-train a gate rule for ordinary training, on a mixture of small problems.

Claim: gates that read normalised moments, meta-trained for a few core-hours on small
networks, train networks of other kinds and sizes (`held_out`).

    python -m experiments.learned_optimizer.general --folder RUN           # or resume
    python -m experiments.learned_optimizer.general --folder RUN --export  # its best

Each meta-step is one family's (`meta_tasks`): persistent evolution strategies with
antithetic pairs over runs of log-uniform length, or, for the cheap families, exact
derivatives through whole short runs. Every run has a scale of its parameters and of its
loss, drawn once; most runs know their progress. Validation is on five other families:
the mean log ratio of final losses to AdamW's with a tuned rate and a cosine, below 0
where the rule ends lower. The best is kept, and written to RUN/NAME.npz at the end.

Cost: CPU_NOTE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from experiments.common.cli import Count, Natural, Options, Positive, Share, parse
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import locked

MODULE = "experiments.learned_optimizer.general"


class Config(Options, frozen=True):
    folder: Path = Path("runs") / "general"
    """The run's; it is resumed if there is one."""
    export: bool = False
    """Write the best rule of the run so far, and train no further."""
    seed: Natural = 0
    """Of everything that is drawn."""
    hidden_size: Count = 8
    """Hidden units of the rule."""
    meta_steps: Count = 60_000
    """Meta-steps, over which the rate decays to 0 by a cosine."""
    learning_rate: Positive = 3e-3
    """Adam's, on the rule's parameters."""
    pes_std: Positive = 0.03
    """Of the perturbations."""
    unroll_steps: Count = 50
    """Updates of a segment of evolution, and of a whole run that is differentiated."""
    horizon: tuple[int, int] = (100, 2000)
    """Between which the length of a run is drawn."""
    scaling: tuple[float, float] = (0.3, 3.0)
    """Between which the scale of a run's parameters is drawn."""
    loss_scaling: tuple[float, float] = (0.01, 100.0)
    """Likewise of its loss."""
    tell_progress: Share = 0.75
    """Share of the runs that know their progress."""
    backprop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ..")] = (
        "logistic",
        "noisy-quadratics",
    )
    """Families that also have exact derivatives; of networks they take minutes to
    compile."""
    backprop_weight: Positive = 0.5
    """How often these meta-steps are, one of a family's others being 1."""
    validation_steps: Count = 1_000
    """Updates of a validation run."""
    validation_instances: Count = 4
    """Runs of each family of validation."""
    validate_every: Count = 1_000
    """Meta-steps between validations."""
    save_every: Count = 250
    """Meta-steps between checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    config = parse(Config(), words, module=MODULE, description=__doc__)
    keep_compiled_programs()
    from experiments.common.script_end import Interrupted
    from experiments.learned_optimizer import general_training

    with locked(config.folder):
        try:
            general_training.run(config)
        except Interrupted:
            print(f"stopped; the same command resumes {config.folder}")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
