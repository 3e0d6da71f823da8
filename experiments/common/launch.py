"""Start a script in several processes on this machine, and watch over them.

    python -m experiments.common.launch --processes 2 -- experiments.few_shot --workdir RUN

Each process gets --distributed and its place among the others. When one of them dies,
what became of it and the last lines of its log are printed, the others are stopped, and
a command that goes on from the last checkpoint is named. Ctrl-C is passed on: the
processes save and end.

The first process's output is shown; all are kept in --log-dir. On a cluster nothing of
this is needed: its own launcher runs the same command, with --distributed, on every
host (docs/pods.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import tyro

_GRACE = 5.0  # seconds in which the others may end by themselves
_LAST_SAVE = 60.0  # seconds between the first and the last to end after Ctrl-C
_POLL = 0.05
_TAIL = 15  # lines
_SAVED = 130  # what a script returns after Ctrl-C


@dataclass(frozen=True)
class Options:
    """Start a script in several processes on this machine, and watch over them.

    What comes after -- is the script and its own options.
    """

    processes: int = 2
    """How many."""
    devices_per_process: int | None = None
    """Split the CPU of each process into this many devices."""
    heartbeat_timeout: int = 100
    """Seconds after which processes end when one of them was not heard of, should this
    one not have stopped them before."""
    log_dir: Path | None = None
    """Where to write process-0.log and so on; default runs/logs/TIME-PID."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, of the process that died first."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, script = _split(arguments)
    options = tyro.cli(Options, args=own, prog="python -m experiments.common.launch")
    try:
        _check(options, script)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    log_dir = options.log_dir or Path("runs") / "logs" / name
    log_dir.mkdir(parents=True, exist_ok=True)
    workers = _start(options, script, log_dir)
    print(f"{options.processes} processes, their logs in {log_dir}", flush=True)
    try:
        with _signals_passed_on(workers):
            return _watch(workers, options, script)
    finally:
        _stop(workers, signal.SIGKILL)
        for worker in workers:
            worker.close()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _check(options: Options, script: list[str]) -> None:
    if not script:
        raise ValueError(
            "no script: python -m experiments.common.launch --processes 2 -- "
            "experiments.few_shot --workdir RUN"
        )
    for name in ("processes", "devices_per_process", "heartbeat_timeout"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: choose 1 or more")


class Worker:
    """One process, its log, and when it ended: the first to die took the others."""

    def __init__(self, index: int, command: list[str], env: dict[str, str], log: Path):
        self.index, self.log = index, log
        self.ended: float | None = None
        # a session of its own: Ctrl-C reaches it through this process alone
        self.process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._copier = threading.Thread(target=self._copy, daemon=True)
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._copier.start()
        self._waiter.start()

    def _wait(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()

    def _copy(self) -> None:
        assert self.process.stdout is not None
        shown: BinaryIO | None = sys.stdout.buffer if self.index == 0 else None
        with open(self.log, "wb", buffering=0) as log:
            while data := self.process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                log.write(data)
                if shown is not None:
                    with contextlib.suppress(OSError, ValueError):  # nobody reads
                        shown.write(data)
                        shown.flush()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self) -> None:
        self._waiter.join()
        self._copier.join(timeout=_GRACE)

    def fate(self) -> str:
        """What became of it, in words."""
        status = self.process.returncode
        who = f"process {self.index} (pid {self.process.pid})"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"{who} was killed by {signal.Signals(-status).name}"
            return f"{who} was killed by signal {-status}"
        return f"{who} ended with exit status {status}"

    def last_lines(self) -> list[str]:
        self._copier.join(timeout=_GRACE)
        text = self.log.read_text(errors="replace")
        lines = [part.rsplit("\r", 1)[-1] for part in text.splitlines()]
        return [line for line in lines if line.strip()][-_TAIL:]


def _start(options: Options, script: list[str], log_dir: Path) -> list[Worker]:
    env = dict(os.environ)
    env["PYTHONUNBUFFERED"] = "1"
    if options.devices_per_process is not None:
        count = f"--xla_force_host_platform_device_count={options.devices_per_process}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {count}".strip()
    place = [
        "--distributed",
        "--coordinator",
        f"localhost:{_free_port()}",
        "--num-processes",
        str(options.processes),
        "--heartbeat-timeout",
        str(options.heartbeat_timeout),
    ]
    return [
        Worker(
            index,
            [sys.executable, "-m", *script, *place, "--process-id", str(index)],
            env,
            log_dir / f"process-{index}.log",
        )
        for index in range(options.processes)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _watch(workers: list[Worker], options: Options, script: list[str]) -> int:
    """Wait until all have ended well, or one has not; return its exit status."""
    while True:
        ended = _in_order(workers)
        died = [w for w in ended if w.process.returncode not in (0, _SAVED)]
        if died:
            return _report(died[0], workers, options, script)
        if len(ended) == len(workers):
            return max(worker.process.returncode for worker in workers)
        # interrupted before it had found the others, one leaves them waiting
        saved = [w for w in ended if w.process.returncode == _SAVED]
        if saved and time.monotonic() - (saved[0].ended or 0) > _LAST_SAVE:
            return _report(saved[0], workers, options, script)
        time.sleep(_POLL)


def _in_order(workers: list[Worker]) -> list[Worker]:
    """Those that have ended, the first to end first."""
    ended = [(w.ended, w.index) for w in workers if w.ended is not None]
    return [workers[index] for _, index in sorted(ended)]


def _report(
    first: Worker, workers: list[Worker], options: Options, script: list[str]
) -> int:
    """Say which process died and of what, stop the others, say how to go on."""
    print(f"\n{first.fate()}; the last lines of {first.log}:", flush=True)
    for line in first.last_lines():
        print(f"  | {line}")
    silent = _silent(first.log)
    if silent:
        print(
            f"before that, process {silent} was not heard of for "
            f"{options.heartbeat_timeout} seconds: it hung, or its machine did; the "
            f"end of its log is in {first.log.with_name(f'process-{silent}.log')}"
        )
    # of the same mistake the others die by themselves, and say so in their logs
    deadline = time.monotonic() + _GRACE
    while any(w.ended is None for w in workers) and time.monotonic() < deadline:
        time.sleep(_POLL)
    running = [worker for worker in workers if worker.ended is None]
    _stop(running, signal.SIGKILL)  # a checkpoint is whole or not there
    for worker in running:
        worker.close()
    if running:
        names = ", ".join(str(worker.index) for worker in running)
        print(f"stopped the others, which waited for it: {names}")
    folder = _run_folder(workers[0].log)
    if folder is not None:
        print(
            f"to go on from the last checkpoint:\n  {_again(options, script, folder)}"
        )
    status = first.process.returncode
    return status if status > 0 else 128 - status


def _silent(log: Path) -> str | None:
    """The process whose heartbeats stopped, as JAX says when it gives up."""
    pattern = r"\(stopped sending heartbeats\):\s+(\d+)\s"
    found = re.search(pattern, log.read_text(errors="replace"))
    return found[1] if found else None


def _again(options: Options, script: list[str], folder: str) -> str:
    command = [
        "python -m experiments.common.launch",
        f"--processes {options.processes}",
    ]
    if options.devices_per_process is not None:
        command.append(f"--devices-per-process {options.devices_per_process}")
    return " ".join([*command, "--", script[0], "--resume", folder])


def _run_folder(log: Path) -> str | None:
    """The folder that the script said it writes to."""
    pattern = r"^to go on: python -m \S+ --resume (.+)$"
    found = re.findall(pattern, log.read_text(errors="replace"), re.MULTILINE)
    return found[-1] if found else None


def _stop(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        if worker.ended is None:
            worker.send(number)


@contextlib.contextmanager
def _signals_passed_on(workers: list[Worker]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        _stop(workers, number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        old = {number: signal.signal(number, pass_on) for number in numbers}
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
