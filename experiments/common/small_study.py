"""The command line of a study that is one file of options and one run folder.

No jax here, so that --help is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import (
    free_folder,
    locked,
    refuse_other_runs,
    write_json,
)
from experiments.common.saved_options import (
    did_you_mean,
    split_commas,
    to_json,
    value_of,
)
from experiments.common.script_end import exit_status

Options = TypeVar("Options")


def parse(
    name: str,
    default: Options,
    presets: Mapping[str, Mapping[str, Any]],
    description: str,
    arguments: Sequence[str],
) -> Options:
    """Read the flags of ``python -m experiments.NAME``; a preset gives the defaults.

    Options are a flat dataclass. A comma-separated value of a tuple of strings is
    split.

    Raises:
      ValueError: there is no such preset.
    """
    arguments = list(arguments)
    named = value_of("--preset", arguments)
    if named is not None:
        if named not in presets:
            raise ValueError(f"--preset {named}: {did_you_mean(named, presets)}")
        default = dataclasses.replace(default, **presets[named])  # type: ignore[type-var]
    found: Options = tyro.cli(
        type(default),
        args=arguments,
        default=default,
        description=description,
        prog=f"python -m experiments.{name}",
    )
    changes = {}
    for option, value in vars(found).items():
        if isinstance(value, tuple) and any(isinstance(part, str) for part in value):
            changes[option] = split_commas(value)
    return dataclasses.replace(found, **changes)  # type: ignore[type-var]


def check_ranges(
    config: Any, *, above_zero: Sequence[str] = (), **lowest: float
) -> None:
    """Refuse options below their lowest value, or lists with such a part.

    Raises:
      ValueError: names the flag, the value and what would do.
    """
    for name in (*lowest, *above_zero):
        value = getattr(config, name)
        parts = value if isinstance(value, tuple) else (value,)
        flag = f"--{name.replace('_', '-')}"
        if not parts:
            raise ValueError(f"{flag} is empty: give at least one")
        for part in parts:
            if name in above_zero and not part > 0:
                raise ValueError(f"{flag} {part:g}: choose a number above 0")
            if name in lowest and part < lowest[name]:
                raise ValueError(f"{flag} {part:g}: choose {lowest[name]:g} or more")


def recipe(config: Any) -> dict[str, Any]:
    """The options as JSON, without those that say nothing of the result."""
    left_out = {"workdir", "data_dir", "debug"}
    return {name: v for name, v in to_json(config).items() if name not in left_out}


def run_command(
    name: str,
    parse_arguments: Callable[[list[str]], Any],
    load_runner: Callable[[], Callable[[Any, Path], None]],
    arguments: Sequence[str] | None = None,
    may_change: Sequence[str] = (),
) -> int:
    """Parse, take the run folder, write config.json, run.

    The same command with the same ``--workdir`` goes on with a stopped run, as far as
    the runner kept what it had finished.

    Args:
      load_runner: imports what runs; called when the options are known to be good.
      may_change: options that may differ when a run goes on in its folder.

    Returns:
      The exit status: 2 for a mistake, 130 for Ctrl-C.
    """
    folder: Path | None = None

    def body(arguments: list[str]) -> None:
        nonlocal folder
        config = parse_arguments(arguments)
        folder = config.workdir or free_folder(Path("runs") / name)
        changeable = (*may_change, "preset", "workdir", "debug")
        refuse_other_runs(folder, config, changeable)
        keep_compiled_programs()
        run = load_runner()
        with locked(folder, config, changeable):
            write_json(folder / "config.json", {"config": to_json(config)})
            run(config, folder)

    def stopped() -> str:
        return f"stopped; to go on: the same with --workdir {folder}"

    return exit_status(body, arguments, stopped=stopped)
