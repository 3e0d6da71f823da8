"""How a script is stopped, how it ends, and what it says of a mistake."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "exit_status", "handled", "stops_on_ctrl_c"]


class Interrupted(Exception):  # noqa: N818 (a request, not an error)
    """Ctrl-C came; everything is saved."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to ``handler``; in another thread leave them alone."""
    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        old = {}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


@contextmanager
def stops_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Give what says whether Ctrl-C or SIGTERM came; Ctrl-C after it stops at once.

    A cluster may send SIGTERM more than once, to the process and to its group.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if requested:
            return
        requested = True
        said = "stopping after this step; Ctrl-C once more to stop at once"
        print(f"\n{said}", file=sys.stderr)

    with handled(request):
        yield lambda: requested


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
