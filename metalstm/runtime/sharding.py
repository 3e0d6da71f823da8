"""The tasks of a meta-step spread over several devices.

Meta-parameters and pools are copied to every device, tasks are split over the mesh's
``"task"`` axis (`metalstm.tasks`), and the coordinates of a task, where asked for, over
its ``"coordinate"`` axis (`inner.coordinatewise`). On one device none of this does
anything. `runtime.processes` has what several processes need.
"""

from __future__ import annotations

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
    "axis_devices",
    "block_on_cpu_collectives",
    "collect",
    "gather",
    "local",
    "place",
    "psum_cotangent",
    "shared_axis",
    "spread",
    "task_mesh",
]

COORDINATE = "coordinate"  # the mesh axis of devices that share a task


def task_mesh(
    num_tasks: int | None = None,
    *,
    num_devices: int | None = None,
    devices_per_task: int = 1,
) -> Mesh | None:
    """A mesh for the tasks of a meta-step; None with a single device.

    Args:
      num_tasks: tasks of a meta-step. None: any number.
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


def shared_axis(mesh: Mesh | None) -> str | None:
    """Return the axis of `task_mesh` whose devices share a task, None without one.

    It is the ``axis_name`` of the algorithms that are trained over the mesh.
    """
    has_axis = mesh is not None and COORDINATE in mesh.axis_names
    return COORDINATE if has_axis else None


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
            f"axis_name={axis_name!r} is no axis of the current mesh: call this over a "
            "mesh that has it (task_mesh(devices_per_task=..)), or omit it"
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


def block_on_cpu_collectives(tree: PyTree) -> None:
    """Wait for what was computed on several devices of a CPU; elsewhere do not wait.

    Such devices share threads, and in a collective each holds one until all have come.
    With two programs under way the second's can take the last of them: both then wait
    for ever (jax 0.10.2 aborts after 40 seconds).
    """
    for leaf in (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)):
        devices: list[Any] = [*leaf.sharding.device_set]
        if len(devices) > 1 and devices[0].platform == "cpu":
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
