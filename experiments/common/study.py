"""A study that is one file: its options, its run folder, its tables and figures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments.common import cli, report
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import (
    free_folder,
    locked,
    refuse_other_runs,
    write_json,
)
from experiments.common.saved_options import to_json, value_of
from experiments.common.script_end import exit_status
from experiments.common.tables import Table
from metalstm.runtime.files import atomic_write

__all__ = ["StudyOptions", "read", "run_study", "write_results"]


class StudyOptions(cli.Options, frozen=True, kw_only=True):
    """What every study has."""

    seed: cli.Natural = 0
    """Of meta-training and of the episodes."""
    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    workdir: Path | None = None
    """The run folder; default runs/NAME. What is finished there is kept."""
    debug: bool = False
    """Show tracebacks."""


Config = TypeVar("Config", bound=StudyOptions)


def read(
    default: Config,
    arguments: Sequence[str],
    *,
    module: str,
    description: str | None,
    presets: Mapping[str, str] | None = None,
) -> Config:
    """Read the flags of ``python -m MODULE``; a preset is flags that come before.

    Raises:
      ValueError: an unknown preset, or an option outside its limits.
    """
    said: dict[str, Any] = {"module": module, "description": description}
    named = value_of("--preset", arguments)
    if named is not None:
        presets = presets or {}
        cli.check_names("--preset", [named], presets)
        default = cli.parse(default, presets[named].split(), **said)
    return cli.parse(default, arguments, **said)


def run_study(
    name: str,
    parse: Callable[[list[str]], Config],
    run: Callable[[Config, Path], None],
    arguments: Sequence[str] | None = None,
    may_change: Sequence[str] = (),
) -> int:
    """Read the options, take the run folder, write config.json, run.

    The same command with the same ``--workdir`` resumes a stopped run, as far as
    ``run`` kept what it had finished.

    Args:
      may_change: options that may differ when a run resumes in its folder.

    Returns:
      The exit status: 2 for a mistake, 130 for Ctrl-C.
    """
    folder: Path | None = None

    def body(arguments: list[str]) -> None:
        nonlocal folder
        config = parse(arguments)
        folder = config.workdir or free_folder(Path("runs") / name)
        changeable = (*may_change, "preset", "workdir", "debug")
        refuse_other_runs(folder, config, changeable)
        keep_compiled_programs()
        with locked(folder, config, changeable):
            write_json(folder / "config.json", {"config": to_json(config)})
            run(config, folder)

    def stopped() -> str:
        return f"stopped; to resume: the same with --workdir {folder}"

    return exit_status(body, arguments, stopped=stopped)


def write_results(
    folder: Path,
    config: StudyOptions,
    tables: Sequence[Table],
    results: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Print the tables; write table.md, results.json and the figures by their names."""
    text = "\n".join(table.markdown().lstrip() for table in tables)
    with atomic_write(folder / "table.md") as part:
        part.write_text(text)
    settings = to_json(config)
    for name in ("workdir", "data_dir", "debug"):  # they do not change the result
        settings.pop(name, None)
    document = {
        "config": settings,
        **results,
        "versions": report.versions(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    write_json(folder / "results.json", document)
    for name, figure in figures.items():
        report.save_figure(figure, folder / name)
    print(*tables, sep="\n\n")
    written = ["table.md", "results.json", *figures]
    print(textwrap.fill(f"{', '.join(written)} in {folder}", break_on_hyphens=False))
