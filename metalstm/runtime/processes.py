"""Several processes that run one program: joining them, and agreeing.

Every process runs the same program with the same arguments and takes the same steps.
What one of them knows (its clock, a signal, a file it cannot read) is agreed on before
any of them acts on it. In one process all of this does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metalstm.checks import check_at_least

__all__ = ["any_process", "from_main", "initialize", "is_main", "on_main"]

# Processes wait for each other when they end, and process 0 has figures to draw and
# studies to make. A process that died is noticed by its heartbeat, not by this.
_LAST_SECONDS = 7 * 24 * 3600
_MAX_TEXT = 8192  # bytes


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 100,
) -> None:
    """Join the other processes; to be called before anything is computed.

    Args:
      coordinator: ``host:port`` where process 0 listens. Without it and the next two,
        the cluster's environment says: a TPU pod, Slurm, Open MPI, Kubernetes.
      num_processes, process_id: how many processes, and which one this is, from 0.
      heartbeat_timeout: seconds. When a process is silent for this long, the runtime
        ends the others; no exception can be caught then.

    Raises:
      ValueError: some of the three are missing, or there is no cluster's environment.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} missing: give coordinator, num_processes and "
            "process_id, or none of them on a cluster that JAX knows"
        )
    if not missing:
        _check_given(str(coordinator), int(num_processes or 0), int(process_id or 0))
    check_at_least("heartbeat_timeout", heartbeat_timeout, 1)
    # SIGTERM stays the program's own
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=_LAST_SECONDS,
        )
    except ValueError as error:
        if not missing:
            raise
        raise ValueError(
            "no cluster's environment that JAX knows was found (a TPU pod, Slurm, "
            f"Open MPI, Kubernetes; {error}): give coordinator=host:port, "
            "num_processes= and process_id="
        ) from error


def _check_given(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"coordinator={coordinator!r}: give host:port, such as 10.0.0.1:9876"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id={process_id} of num_processes={num_processes}: processes "
            "count from 0 to num_processes - 1"
        )


def is_main() -> bool:
    """Whether this is process 0, which alone prints and writes logs."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask, and all hear the same."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_main(text: str) -> str:
    """The text of process 0; all must ask."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    # a letter that is cut in two at the end is dropped
    own = text.encode()[:_MAX_TEXT]
    sent = np.zeros(_MAX_TEXT, np.uint8)
    sent[: len(own)] = np.frombuffer(own, np.uint8)
    heard = bytes(multihost_utils.broadcast_one_to_all(sent))
    return heard.rstrip(b"\0").decode(errors="ignore")


def on_main(act: Callable[[], Any]) -> None:
    """Do it on process 0 alone; where it raises, the others raise ValueError."""
    error: Exception | None = None
    if is_main():
        try:
            act()
        except Exception as raised:
            error = raised
    # what process 0 raises, the others hear
    message = from_main("" if error is None else f"process 0: {error}")
    if error is not None:
        raise error
    if message:
        raise ValueError(message)
