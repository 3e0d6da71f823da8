"""Flags for several devices and processes, and what follows from them.

No jax is imported before it is needed, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from experiments.common import cli


class Devices(cli.Options, frozen=True):
    """Where to compute."""

    devices: cli.Count | None = None
    """Devices that share the tasks of a meta-step; default: all, or in one process as
    many as divide these tasks."""
    cpu_devices: cli.Count | None = None
    """Devices that a CPU counts as: with one to a core the tasks of a meta-step are
    computed at the same time; default: one, whose operations share the cores, and with
    several --seeds one to a core."""
    devices_per_task: cli.Count = 1
    """Devices that share one task, where there are fewer tasks than devices: each has
    the rule's part of the work for its share of the parameters. For learned optimizers
    and the Meta-LSTM in first order; other methods gain nothing."""
    matmul_precision: Literal["bfloat16", "tensorfloat32", "float32"] | None = None
    """Of the network's convolutions and matrix products; default: JAX's choice for the
    device (TPU: inputs rounded to bfloat16, GPU: to TensorFloat-32). What is sensitive
    to rounding (gates, distances, statistics, scores) is in float32 always."""
    distributed: bool = False
    """This is one of several processes that run the same command. A TPU pod, Slurm or
    Open MPI say which; else the next three flags do."""
    coordinator: str | None = None
    """HOST:PORT where process 0 listens."""
    num_processes: int | None = None
    """How many processes."""
    process_id: int | None = None
    """Which one this is, from 0."""
    heartbeat_timeout: cli.Count = 100
    """Seconds after which processes end when one of them was not heard of."""


# none of them is part of the recipe: a run may be resumed elsewhere
MAY_CHANGE = tuple(f"devices.{name}" for name in Devices.__struct_fields__)


def check(devices: Devices) -> None:
    """Refuse what cannot work; raises ValueError with the flag and the remedy."""
    cli.check(devices)
    manual = {
        "--coordinator": devices.coordinator,
        "--num-processes": devices.num_processes,
        "--process-id": devices.process_id,
    }
    given = [flag for flag, value in manual.items() if value is not None]
    missing = [flag for flag, value in manual.items() if value is None]
    if given and missing:
        raise ValueError(f"{given[0]} needs {' and '.join(missing)} too")
    if given and not devices.distributed:
        raise ValueError(f"{given[0]} goes with --distributed: add it")


def join(devices: Devices, num_seeds: int = 1) -> None:
    """Tell JAX how to compute, and find the other processes, if there are to be any.

    Process 0 alone prints.

    Args:
      num_seeds: which may be computed at the same time.

    Raises:
      ValueError: ``cpu_devices`` comes too late, for JAX has started already.
    """
    if devices.matmul_precision is not None:
        import jax

        jax.config.update("jax_default_matmul_precision", devices.matmul_precision)
    cpu_devices = devices.cpu_devices
    if cpu_devices is None and num_seeds > 1 and not devices.distributed:
        cpu_devices = min(num_seeds, os.cpu_count() or 1)
    if cpu_devices is not None:
        import jax

        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError as error:
            if devices.cpu_devices is None:
                return
            raise ValueError(
                f"--cpu-devices {devices.cpu_devices}: JAX has started in this process "
                "already: run the script in a process of its own"
            ) from error
    if not devices.distributed:
        return
    from metalstm.runtime import processes

    processes.initialize(
        devices.coordinator,
        devices.num_processes,
        devices.process_id,
        heartbeat_timeout=devices.heartbeat_timeout,
    )
    if not processes.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)


def mesh_for(devices: Devices, num_tasks: int, flag: str) -> Any:
    """The mesh of a meta-step, None for one device; ``flag`` sets ``num_tasks``.

    Raises:
      ValueError: the devices do not divide the tasks, or there are not so many.
    """
    from metalstm.runtime import sharding

    count, each = devices.devices, devices.devices_per_task
    given = f"{flag} {num_tasks}"
    given += "" if count is None else f", --devices {count}"
    given += "" if each == 1 else f", --devices-per-task {each}"
    try:
        return sharding.task_mesh(num_tasks, num_devices=count, devices_per_task=each)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error


def describe(mesh: Any) -> str:
    """How many devices compute a meta-step, of how many, in how many processes."""
    import jax

    total = jax.device_count()
    used = 1 if mesh is None else mesh.devices.size
    text = f"{total} device" + "s" * (total != 1)
    if used < total:
        text = f"{used} of {text}"
    if jax.process_count() > 1:
        text += f" in {jax.process_count()} processes"
    asked = jax.config.jax_default_matmul_precision
    return text if asked is None else f"{text}, products in {asked}"


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a script's ``main`` and end the process with its status.

    Among several processes one that fails ends at once: to wait for the others, as
    JAX does at exit, would be to wait for what this one was to compute.
    """
    try:
        status = main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        status = 1
    if status not in (0, 130) and is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_one_of_several() -> bool:
    """Whether `join` has found other processes."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
