"""Atomic writes: a file is complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_write", "finished_files", "is_unfinished"]

_PREFIX = ".part-"
_ABANDONED_AFTER = 3600.0  # seconds without a write: no process is writing it any more


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give another name in the same folder to write to; at the end it becomes ``path``.

    Until then, when something is raised, and after a kill at any moment, ``path`` is
    unchanged. An hour later, the next write of ``path`` removes what a killed process
    left. The name given has the suffix of ``path``.

    Raises:
      OSError: it cannot be written; names ``path`` and the remedy.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: make its folder first")
    _remove_abandoned(path)
    part = path.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # before the name: power may fail
        part.replace(path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): free space on its "
            "disk, or make its folder writable"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone, when all went well
            part.unlink()


def finished_files(folder: Path, pattern: str) -> dict[str, Path]:
    """Return the files of a pattern by their stems, sorted, without unfinished ones."""
    found = sorted(folder.glob(pattern))
    return {path.stem: path for path in found if not path.name.startswith(_PREFIX)}


def is_unfinished(name: str, of: str) -> bool:
    """Whether ``name`` is that of an unfinished file which was to be called ``of``."""
    return name.startswith(_PREFIX) and name[len(_PREFIX) + 8 :] == f"-{of}"


def _remove_abandoned(path: Path) -> None:
    for left in path.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process may remove it too
            old = time.time() - left.stat().st_mtime > _ABANDONED_AFTER
            if old and is_unfinished(left.name, path.name):
                left.unlink()
