"""A long command: one run in one folder, to be stopped, resumed and tested again.

``MODULE.running`` has ``run(config, folder)``, ``evaluate(config, arguments)`` and
``choose_folder(config)``. It is imported once the flags are read: it needs jax.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.common import devices
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import locked
from experiments.common.script_end import Interrupted, exit_status

__all__ = ["run_command", "run_in"]


def run_command(
    module: str,
    parse: Callable[[list[str]], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    folder: Path | None = None

    def body(arguments: list[str]) -> int | None:
        nonlocal folder
        config = parse(arguments)
        keep_compiled_programs()
        devices.join(config.devices, getattr(config.run, "seeds", 1))
        running: Any = importlib.import_module(f"{module}.running")
        if config.run.evaluate:
            return running.evaluate(config, arguments)
        folder = running.choose_folder(config)
        return running.run(config, folder)

    def stopped() -> str:
        kept = "stopped at once; what was saved is kept"
        if folder is None or not (folder / "config.json").exists():
            return kept
        return f"{kept}\n{_resume_hint(module, folder)}"

    return exit_status(body, arguments, stopped=stopped)


def run_in(
    folder: Path,
    config: Any,
    may_change: Sequence[str],
    run: Callable[[], Any],
    module: str,
) -> int:
    """Run while this process holds the folder; return the exit status."""
    hint = _resume_hint(module, folder)
    with locked(folder, config, may_change):
        if devices.is_one_of_several():
            print(hint, flush=True)  # a process may die
        try:
            run()
        except Interrupted:
            print(f"stopped and saved; {hint}")
            return 130
    return 0


def _resume_hint(module: str, folder: Path) -> str:
    return f"to resume: python -m {module} --resume {folder}"
