"""Start a script in several processes on this machine, and watch over them.

    python -m experiments.common.launch --processes 2 -- experiments.few_shot ...

Each process gets --distributed and its place among the others. When one of them dies,
this one says which and how, prints the last lines of its log, stops the others, and
names the command that resumes from the last checkpoint. Ctrl-C is passed on: the
processes save and end. Process 0's output is shown; all are kept in --log-dir.

A cluster needs none of this: its own launcher runs the same command, with
--distributed, on every host (docs/pods.md).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

from experiments.common import cli
from experiments.common.script_end import handled

_GRACE = 5.0  # seconds in which the others may end by themselves
_LAST_SAVE = 60.0  # seconds between the first and the last to end after Ctrl-C
_POLL = 0.05
_TAIL = 15  # lines
_SAVED = 130  # what a script returns after Ctrl-C


class Options(cli.Options, frozen=True):
    """Start a script in several processes on this machine, and watch over them.

    What comes after -- is the script and its own options.
    """

    processes: cli.Count = 2
    """How many."""
    heartbeat_timeout: cli.Count = 100
    """Seconds after which processes end when one of them was not heard of, should this
    one not have stopped them before."""
    log_dir: Path | None = None
    """Where to write process-0.log and so on; default runs/logs/TIME-PID."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, of the process that died first."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    script = arguments[end + 1 :]
    module = "experiments.common.launch"
    try:
        options = cli.parse(
            Options(), arguments[:end], module=module, description=Options.__doc__
        )
        if not script:
            raise ValueError(
                f"no script: python -m {module} --processes 2 -- experiments.few_shot "
                "--workdir RUN"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    log_dir = options.log_dir or Path("runs") / "logs" / name
    log_dir.mkdir(parents=True, exist_ok=True)
    workers = _start(options, script, log_dir)
    print(f"{options.processes} processes, their logs in {log_dir}", flush=True)

    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            worker.process.send_signal(number)  # nothing, once it has ended

    try:
        with handled(pass_on), workers[0].log.open("rb") as said:
            first = _watch(workers, said)
            if first is None:
                return max(worker.process.returncode for worker in workers)
            _report(first, workers, options, script)
            _show(said)
            status = first.process.returncode
            return status if status > 0 else 128 - status
    finally:
        _stop(workers)


class Worker:
    """One process and its log; ``ended`` gets it when it ends."""

    def __init__(
        self, index: int, command: list[str], log: Path, ended: SimpleQueue[Worker]
    ):
        self.index, self.log, self.ended = index, log, ended
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            # a session of its own: Ctrl-C reaches it through this process alone
            self.process = subprocess.Popen(
                command, env=env, stdout=file, stderr=file, start_new_session=True
            )
        self.waiter = threading.Thread(target=self._wait, daemon=True)
        self.waiter.start()

    def _wait(self) -> None:
        self.process.wait()
        self.ended.put(self)

    def lines(self) -> list[str]:
        """What it said; of a progress bar, how it ended."""
        text = self.log.read_text(errors="replace")
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines()]
        return [line for line in lines if line.strip()]


def _start(options: Options, script: list[str], log_dir: Path) -> list[Worker]:
    place = (
        f"--distributed --coordinator localhost:{_free_port()} "
        f"--num-processes {options.processes} "
        f"--heartbeat-timeout {options.heartbeat_timeout} --process-id"
    )
    command = [sys.executable, "-m", *script, *place.split()]
    ended: SimpleQueue[Worker] = SimpleQueue()
    return [
        Worker(index, [*command, str(index)], log_dir / f"process-{index}.log", ended)
        for index in range(options.processes)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _watch(workers: list[Worker], said: BinaryIO) -> Worker | None:
    """Wait until all have ended well, or return the first that has not."""
    left, saved, deadline = len(workers), workers[0], math.inf
    while left > 0:
        try:
            worker = workers[0].ended.get(timeout=_POLL)
        except Empty:
            worker = None
        _show(said)
        if worker is None:
            # interrupted before it had found the others, one leaves them waiting
            if time.monotonic() > deadline:
                return saved
            continue
        left -= 1
        if worker.process.returncode not in (0, _SAVED):
            return worker
        if worker.process.returncode == _SAVED and deadline == math.inf:
            saved, deadline = worker, time.monotonic() + _LAST_SAVE
    return None


def _show(said: BinaryIO) -> None:
    """Print what process 0 has said since."""
    with contextlib.suppress(OSError):  # nobody reads
        sys.stdout.flush()
        sys.stdout.buffer.write(said.read())
        sys.stdout.buffer.flush()


def _report(
    first: Worker, workers: list[Worker], options: Options, script: list[str]
) -> None:
    """Say which process died and how, stop the others, say how to resume."""
    status = first.process.returncode
    fate = f"ended with exit status {status}"
    if status < 0:
        fate = f"was killed by {signal.Signals(-status).name}"
    who = f"process {first.index} (pid {first.process.pid})"
    print(f"\n{who} {fate}; the last lines of {first.log}:", flush=True)
    for line in first.lines()[-_TAIL:]:
        print(f"  | {line}")
    # of the same mistake the others die by themselves, and say so in their logs
    deadline = time.monotonic() + _GRACE
    for worker in workers:
        worker.waiter.join(max(deadline - time.monotonic(), 0))
    running = [worker for worker in workers if worker.waiter.is_alive()]
    names = ", ".join(str(worker.index) for worker in running)
    if status == -signal.SIGABRT and running:
        print(
            "JAX ends a process like this when another was not heard of for "
            f"{options.heartbeat_timeout} seconds: it hung, or its machine did; still "
            f"running: process {names}, whose log is {running[0].log}"
        )
    _stop(running)
    if running:
        print(f"stopped the others, which waited for it: {names}")
    hints = [line for line in workers[0].lines() if " --resume " in line]
    if hints:
        folder = hints[-1].rsplit(" --resume ", 1)[1]
        print(
            "to resume from the last checkpoint:\n  python -m "
            f"experiments.common.launch --processes {options.processes} -- {script[0]} "
            f"--resume {folder}"
        )


def _stop(workers: Sequence[Worker]) -> None:
    """Kill them: a checkpoint is whole or not there."""
    for worker in workers:
        worker.process.kill()
        worker.waiter.join()


if __name__ == "__main__":
    sys.exit(main())
