"""A file system that fails at a chosen operation or byte, in a child process.

Operations are seen by an audit hook, so whatever Python code makes them is stopped
before them, orbax's too. What native code writes is stopped at a byte: the kernel's
limit on a file's size ends the process, or fails the write, in the middle of it.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

_CREATES = ("os.mkdir", "os.rename", "os.link", "os.symlink")
_REMOVES = ("os.remove", "os.rmdir")
_SECONDS = 120  # after which a child hangs


class Fault(NamedTuple):
    """The process is killed before operation (or at byte) ``at``, or the disk full."""

    kind: Literal["killed", "full"]
    unit: Literal["operation", "byte"]
    at: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.unit} {self.at}"


class Ended(NamedTuple):
    how: Literal["done", "refused", "killed"]
    message: str


def in_child(
    work: Callable[[], Any], folder: Path, fault: Fault | None = None
) -> Ended:
    """Run ``work`` in a forked process under ``fault``.

    Raises:
      RuntimeError: it ended in a way that no fault explains: another exception than an
        OSError, a crash, or not within two minutes.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # nothing that holds a lock has been started yet, see `writers`
        warnings.simplefilter("ignore")
        process = os.fork()
    if process == 0:
        os.close(reading)
        _child(work, folder, fault, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        meant = fault is not None and fault.kind == "killed"
        if meant and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ):
            return Ended("killed", "")
        raise RuntimeError(f"ended by signal {os.WTERMSIG(status)} ({fault})")
    if os.WEXITSTATUS(status) == 0:
        return Ended("done", message)
    if os.WEXITSTATUS(status) == 3:
        return Ended("refused", message)
    raise RuntimeError(message)


def _child(work, folder: Path, fault: Fault | None, pipe: int) -> None:
    code, message = 1, ""
    try:
        signal.alarm(_SECONDS)
        if fault is not None:  # orbax prints a traceback for what is meant to fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if fault is not None:
            _prepare(fault, folder)
        message = str(work() or "")
        code = 0
    except OSError as error:
        code, message = 3, str(error)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        os.write(pipe, message.encode())
        os._exit(code)


def _prepare(fault: Fault, folder: Path) -> None:
    if fault.unit == "byte":
        if fault.kind == "killed":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return
    seen = 0

    def stop(event: str) -> None:
        nonlocal seen
        seen += 1
        if seen <= fault.at:
            return
        if fault.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif event not in _REMOVES:  # a full disk lets one remove
            raise OSError(errno.ENOSPC, "No space left on device")

    _watch(folder, stop)


def count_operations(work: Callable[[], Any], folder: Path) -> int:
    """How many operations ``work`` makes in ``folder``."""

    def counted() -> int:
        seen = []
        _watch(folder, seen.append)
        work()
        return len(seen)

    return int(in_child(counted, folder).message)


def _watch(folder: Path, stop: Callable[[str], None]) -> None:
    inside = str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            named = isinstance(path, str | os.PathLike)
            to_write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if named and to_write and os.fspath(path).startswith(inside):
                stop(event)
        elif event in _CREATES and os.fspath(args[0]).startswith(inside):
            stop(event)
        elif event in _REMOVES:
            # rmtree names what it removes relative to a descriptor
            path = os.fspath(args[0])
            if path.startswith(inside) or not os.path.isabs(path):
                stop(event)

    sys.addaudithook(hook)
