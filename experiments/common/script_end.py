"""How a script ends: its exit status, and what it says of a mistake."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["exit_status", "what_is_kept"]


def exit_status(
    body: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None,
    *,
    stopped: Callable[[], str],
) -> int:
    """Run a script's body; return its status, 2 for a mistake, 130 for Ctrl-C.

    A mistake is what the library raises for bad input, said in one line (with --debug
    in full). Anything else is a bug, and shows.

    Args:
      body: gets the arguments; None is status 0.
      arguments: None for those of the command line.
      stopped: what to say after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return body(arguments) or 0
    except KeyboardInterrupt:
        print(f"\n{stopped()}", file=sys.stderr)
        return 130
    except (ArithmeticError, ImportError, OSError, ValueError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2


def what_is_kept(folder: Path | None, go_on: Callable[[Path], str]) -> str:
    """What to say when a run that can be resumed was stopped at once."""
    kept = "stopped at once; what was saved is kept"
    if folder is None or not (folder / "config.json").exists():
        return kept
    return f"{kept}\n{go_on(folder)}"
