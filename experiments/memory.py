"""Keep freed memory in the process: a program that trains frees what it needs again."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let malloc keep what it frees. Call it before JAX has computed anything.

    XLA:CPU frees its temporary arrays after each call, glibc hands them back to the
    kernel, and the next call faults every page in again: 56,000 faults in a meta-step
    of the published 1-shot recipe, a seventh of its time. The process's memory then
    stays at its peak, which is the same. Programs may decide this, a library may not.

    Returns:
      Whether it was done: False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # one arena: those of threads cannot hold large arrays, and would map them anyway
    settings = [(_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)]
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
