"""Same or different? A run's embeddings on identities that it has not seen.

Claim: what few-shot methods learn to compare verifies identities as well: two images
of a person, a letter or a speaker are told from images of two (Koch et al., 2015).

    python -m experiments.studies.verification RUN                     # the run's test classes
    python -m experiments.studies.verification RUN --methods siamese,arcface
    python -m experiments.studies.verification RUN --dataset folders --data-dir DIR
    python -m experiments.studies.verification RUN --dataset arrays --data-dir speakers.npz

Prints a table and writes verification.json and verification.png to the run's folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a finished run of few_shot."""
    methods: tuple[str, ...] = ()
    """Which of the run's methods; default all that embed."""
    dataset: Literal["run", "folders", "arrays"] = "run"
    """run: the classes that the run tests on; folders: a folder of images for each
    identity; arrays: a .npz of x and y. All identities there are compared."""
    data_dir: Path | None = None
    """The folder or file; run: where the run's data are, if they have moved."""
    pairs: int = 20_000
    """Half of one identity, half of two; the same for every method."""
    similarity: Literal["trained", "cosine", "euclidean"] = "trained"
    """How embeddings are compared; trained: as each method was trained."""
    bootstrap: int = 1_000
    """Draws of identities for the intervals."""
    seed: int = 0
    """Of the pairs and of the draws."""
    debug: bool = False
    """Show tracebacks."""


def parse(arguments: list[str]) -> Config:
    """Read the command line.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    config = tyro.cli(
        Config,
        args=arguments,
        description=__doc__,
        prog="python -m experiments.studies.verification",
    )
    names = [part for item in config.methods for part in item.split(",") if part]
    config = replace(config, methods=tuple(dict.fromkeys(names)))
    for name, low in (("pairs", 200), ("bootstrap", 2), ("seed", 0)):
        if getattr(config, name) < low:
            raise ValueError(f"--{name} {getattr(config, name)}: choose {low} or more")
    if config.dataset != "run" and config.data_dir is None:
        raise ValueError(
            f"--dataset {config.dataset}: say where they are with --data-dir"
        )
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""

    def body(arguments: list[str]) -> None:
        config = parse(arguments)
        keep_compiled_programs()
        from experiments.studies.verifying import verify_run

        verify_run(config)

    said = "stopped; nothing was written"
    return exit_status(body, arguments, stopped=lambda: said)


if __name__ == "__main__":
    sys.exit(main())
