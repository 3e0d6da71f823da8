"""Which of the inner loop's gradients make Reptile learn to learn?

Claim (Nichol et al., 2018, section 6.2, figure 3): theta_0 takes k = 4 steps of SGD on
minibatches of one task, with gradients g1 .. g4, and is moved by a combination of them.
g1 alone is training on all tasks jointly, and does worst; g1 + g2 is Reptile with two
steps, g2 first-order MAML with one; the more minibatches, the better, above all for
sums.

    python -m experiments.studies.reptile_gradients                  # letters, no download
    python -m experiments.studies.reptile_gradients --dataset omniglot --data-dir DIR
    python -m experiments.studies.reptile_gradients --preset demo    # under two minutes

As in the paper: plain SGD inside and outside, one task a meta-step, 5-way 5-shot, and
the same tasks for every combination. Unlike there, every combination has its outer rate
chosen on validation, from the same number of rates, which includes the averages (a sum
at a smaller rate). docs/results/reptile_gradients.md has results, machine and time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.common.small_study import check_ranges, parse, run_command


@dataclass(frozen=True)
class Config:
    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """glyphs (needs no download) or omniglot on held-out alphabets."""
    data_dir: Path | None = None
    """Where TFDS keeps omniglot; also the environment's TFDS_DATA_DIR."""
    way: int = 5
    shot: int = 5
    train_shot: int = 10
    """Images of a class in meta-training, cut into minibatches."""
    queries: int = 5
    """Query images of a class in validation and test."""
    inner_batches: int = 4
    """k, minibatches of an inner loop in meta-training."""
    batch_size: int = 10
    """Images of a minibatch."""
    inner_rate: float = 0.05
    """SGD's inside, in meta-training and at meta-test."""
    outer_rates: tuple[float, ...] = (0.005, 0.02, 0.08)
    """SGD's outside, of which each combination gets its best."""
    test_updates: int = 10
    """Updates on the whole support set in validation and test."""
    filters: int = 16
    """Of the strided Conv4 with layer norm."""
    meta_steps: int = 800
    """Meta-steps, of one task each."""
    validate_every: int = 200
    validation_episodes: int = 60
    test_episodes: int = 600
    seed: int = 0
    preset: str | None = None
    """demo: a look at it."""
    workdir: Path | None = None
    """The run folder; default runs/reptile_gradients. What is finished there is
    kept."""
    debug: bool = False
    """Show tracebacks."""


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "inner_batches": 2,
        "outer_rates": (0.02,),
        "meta_steps": 400,
        "validation_episodes": 50,
    },
}


def combinations(num_batches: int) -> dict[str, tuple[float, ...]]:
    """The weights of g_1 .. g_k: every prefix sum, and every gradient alone."""
    found = {}
    for last in range(1, num_batches + 1):
        names = [f"g{t}" for t in range(1, last + 1)]
        name = " + ".join(names) if last <= 3 else f"g1 + ... + g{last}"
        found[name] = tuple(float(t < last) for t in range(num_batches))
        if last > 1:
            found[f"g{last}"] = tuple(float(t == last - 1) for t in range(num_batches))
    return found


def parse_arguments(arguments: list[str]) -> Config:
    """Read the flags.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    description = "Reptile's meta-update from combinations of inner gradients."
    config = parse("reptile_gradients", Config(), PRESETS, description, arguments)
    check_ranges(
        config, way=2, shot=1, train_shot=1, queries=1, inner_batches=2, batch_size=1,
        test_updates=1, filters=1, meta_steps=1, validate_every=1,
        validation_episodes=2, test_episodes=2, seed=0,
        above_zero=("inner_rate", "outer_rates"),
    )  # fmt: skip
    images = config.way * config.train_shot
    if images % config.batch_size:
        raise ValueError(
            f"--batch-size {config.batch_size} does not divide the {images} images of "
            "--way times --train-shot: choose a divisor"
        )
    if config.meta_steps % config.validate_every:
        raise ValueError(
            f"--meta-steps {config.meta_steps} is not a multiple of --validate-every "
            f"{config.validate_every}"
        )
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def load_runner():
        from experiments.studies.gradient_combinations import run

        return run

    return run_command(
        "reptile_gradients", parse_arguments, load_runner, arguments, ("data_dir",)
    )


if __name__ == "__main__":
    sys.exit(main())
