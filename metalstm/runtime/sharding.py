"""Several devices, several processes: the tasks of a meta-step spread over them.

Every process runs the same program with the same arguments and takes the same steps.
Meta-parameters and pools are copied to every device, tasks are split over the mesh's
``"task"`` axis (`meta.training`), the coordinates of a task, where asked for, over
its ``"coordinate"`` axis (`inner.coordinatewise`), and what one process knows (its
clock, a signal, a file it cannot read) is agreed on before anybody acts on it. On one
device, in one process, all of this does nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array
PyTree = Any

__all__ = [
    "COORDINATE",
    "any_process",
    "axis_devices",
    "collect",
    "from_main",
    "gather",
    "initialize",
    "is_main",
    "local",
    "on_main",
    "place",
    "psum_cotangent",
    "settle",
    "spread",
    "task_mesh",
]

# Processes wait for each other when they end, and process 0 has figures to draw and
# studies to make. A process that died is noticed by its heartbeat, not by this.
_LAST_SECONDS = 7 * 24 * 3600
_MAX_TEXT = 8192  # bytes

COORDINATE = "coordinate"  # the mesh axis of devices that share a task


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
      heartbeat_timeout: seconds. When a process was not heard of for this long, the
        runtime ends the others; no exception can be caught then.

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
    if heartbeat_timeout < 1:
        raise ValueError(f"heartbeat_timeout={heartbeat_timeout}: choose 1 or more")
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


def task_mesh(
    num_tasks: int | None = None,
    *,
    num_devices: int | None = None,
    devices_per_task: int = 1,
) -> Mesh | None:
    """A mesh for the tasks of a meta-step; None when one device is all there is.

    Args:
      num_tasks: tasks of a meta-step. None: any number will do.
      num_devices: how many to use. None: all, but in one process only as many as
        divide ``num_tasks``; several processes leave no device out.
      devices_per_task: share the coordinates of each task between so many. In first
        order each then computes the learner's gradients, all of them, and a
        coordinate-wise rule's updates and derivative for its part; other algorithms
        compute the same on all of them.

    Raises:
      ValueError: there are not so many devices, or they do not divide the tasks.
    """
    devices = jax.devices()
    processes = jax.process_count()
    if num_devices is not None:
        most = len(devices)
        if not 1 <= num_devices <= most or (processes > 1 and num_devices != most):
            would_do = f"1 to {most}" if processes == 1 else f"{most}, all of them"
            raise ValueError(f"num_devices={num_devices}: choose {would_do}")
        devices = devices[:num_devices]
    if devices_per_task < 1 or len(devices) % devices_per_task:
        raise ValueError(
            f"devices_per_task={devices_per_task}: choose a divisor of the "
            f"{len(devices)} devices"
        )
    count = len(devices) // devices_per_task
    if num_tasks is not None and num_tasks % count:
        if num_devices is not None or processes > 1:
            what = f"groups of {devices_per_task} " if devices_per_task > 1 else ""
            of = f" of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"num_tasks={num_tasks} is not a multiple of the {count} {what}devices"
                f"{of}: choose num_tasks of {count}, {2 * count} and so on, or fewer "
                "devices"
            )
        count = max(n for n in range(1, count) if num_tasks % n == 0)
    if devices_per_task > 1:
        grid = np.array(devices[: count * devices_per_task])
        return Mesh(grid.reshape(count, devices_per_task), ("task", COORDINATE))
    return None if count == 1 else Mesh(np.array(devices[:count]), ("task",))


def spread(fn: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """``fn`` on every device of the mesh, each with its part of the arguments.

    Unchecked, a gradient stays each device's own (checked, that of a replicated
    argument is already summed), and any rule's scan may start from plain zeros.
    """
    # Auto axes: jax.make_mesh now makes Explicit ones, which refuse unsharded inputs.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    return jax.shard_map(
        fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def axis_devices(axis_name: str | None) -> int:
    """How many devices lie along a mesh axis; 1 for None.

    Raises:
      ValueError: it is no axis of a mesh that this is traced over.
    """
    if axis_name is None:
        return 1
    try:
        return lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is no axis of the mesh at hand: call this over a "
            "mesh that has it (task_mesh(devices_per_task=..)), or leave it out"
        ) from error


def gather(part: Array, axis_name: str) -> Array:
    """[..., n] of each device along the axis -> [..., all of them], on each."""
    return lax.all_gather(part, axis_name, axis=part.ndim - 1, tiled=True)


def collect(x: Array, axis_name: str) -> Array:
    """What each device along the axis has -> [devices, ...], on each."""
    return lax.all_gather(x, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def psum_cotangent(x: Array, axis_name: str) -> Array:
    """Return ``x``, which every device along the axis has.

    Each device derives by its own part of what is made of ``x``; the derivative of the
    whole is their sum.
    """
    del axis_name
    return x


psum_cotangent.defvjp(
    lambda x, axis_name: (x, None),
    lambda axis_name, _, cotangent: (lax.psum(cotangent, axis_name),),
)


def place(tree: PyTree, mesh: Mesh | None, *, per_task: bool = False) -> PyTree:
    """Copy every array to every device of the mesh, or split its tasks over them.

    Every process gives the same values. What is in place already is not copied.

    Args:
      mesh: None is one device, and takes back what was spread.
      per_task: leaves have a leading [T], of which each device gets its part.
    """
    if mesh is None:
        return local(tree)
    sharding = NamedSharding(mesh, P("task") if per_task else P())

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                return leaf
            if jax.process_count() == 1:
                return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(one, tree)


def settle(tree: PyTree) -> None:
    """Wait for what was computed on several devices of a CPU; elsewhere go on at once.

    Such devices share threads, and in a collective each holds one until all have come.
    With two programs under way the second's can take the last of them: both then wait
    for ever (jax 0.10.2 aborts after 40 seconds).
    """
    if jax.default_backend() != "cpu":
        return
    for leaf in (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        if len(leaf.sharding.device_set) > 1:
            jax.block_until_ready(leaf)


def local(tree: PyTree) -> PyTree:
    """This process's copy of arrays that are on every device: usable without others."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if not leaf.is_fully_replicated:
            raise ValueError(
                f"an array {leaf.shape} is split over devices: only copies are local"
            )
        return leaf.addressable_data(0)

    return jax.tree.map(one, tree)
