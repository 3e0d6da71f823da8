"""The tasks of a meta-step: how they are laid out, and the one mean over them.

Tasks are mapped on one device, in chunks where memory is short, and over the ``"task"``
axis of a mesh. A gradient is the mean over all of them, however they are laid out.

Notation: T tasks, the leading axis [T] of every argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from metalstm.checks import check_at_least
from metalstm.runtime import sharding
from metalstm.runtime.compilation import platform

__all__ = [
    "TaskMapping",
    "default_task_mapping",
    "in_chunks",
    "map_tasks",
    "mean_over_tasks",
    "over_mesh",
]

PyTree = Any

TaskMapping = Literal["vmap", "scan", "unroll"]
"""How tasks of a meta-batch are laid out: all at once, one after another in a
`lax.scan`, or one after another in the traced program."""


def default_task_mapping() -> TaskMapping:
    """One task at a time on a CPU, where it stays in cache; else all at once.

    Second-order MAML, Conv4-64 on 28x28, 4 tasks: "vmap" and "unroll" took 1.05 and
    1.06 times as long as "scan" on two cores (benchmarks/alternatives.py).
    """
    return "scan" if platform() == "cpu" else "vmap"


def map_tasks(fn: Callable, *args: PyTree, how: TaskMapping | None = None) -> PyTree:
    """Apply ``fn`` to each task, the leading axis [T] of every leaf of ``args``.

    ``how=None`` asks `default_task_mapping`.

    Raises:
      ValueError: ``how`` is not a `TaskMapping`.
    """
    how = default_task_mapping() if how is None else how
    if how == "vmap":
        return jax.vmap(fn)(*args)
    if how == "scan":
        return lax.map(lambda xs: fn(*xs), args)
    if how == "unroll":
        num_tasks = jax.tree.leaves(args)[0].shape[0]
        outs = [
            fn(*jax.tree.map(lambda leaf: leaf[i], args))  # noqa: B023 (used at once)
            for i in range(num_tasks)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
    raise ValueError(f"how={how!r}: choose 'vmap', 'scan' or 'unroll'")


def mean_over_tasks(
    fn: Callable,
    *args: PyTree,
    how: TaskMapping | None = None,
    has_per_task: bool = False,
) -> PyTree:
    """Return the mean over tasks of what ``fn`` gives for each.

    With ``has_per_task``, ``fn`` returns a pair, the second of which is not averaged:
    it comes back with a leading [T].

    Raises:
      ValueError: there is no task.

    >>> float(mean_over_tasks(lambda x: x**2, jnp.array([1.0, 3.0])))
    5.0
    """
    how = default_task_mapping() if how is None else how
    if any(leaf.shape[0] == 0 for leaf in jax.tree.leaves(args)):
        raise ValueError("there are 0 tasks, which have no mean: give at least one")
    if how == "scan":

        def one(nothing, *xs):
            averaged, per_task = fn(*xs) if has_per_task else (fn(*xs), ())
            return nothing, averaged, per_task

        _, mean, per_task = _scan_mean(one, (), args)
    else:
        out = map_tasks(fn, *args, how=how)
        averaged, per_task = out if has_per_task else (out, ())
        mean = jax.tree.map(lambda leaf: leaf.mean(0), averaged)
    return (mean, per_task) if has_per_task else mean


def _scan_mean(fn: Callable, carry: PyTree, xs: tuple[PyTree, ...]):
    """Scan ``fn(carry, *x) -> (carry, averaged, per_task)`` over the leading axis.

    Returns the carry, the mean, and what is per task with a leading [T]. What is
    averaged is added to a sum, so that never more than one of it exists.
    """
    length = jax.tree.leaves(xs)[0].shape[0]
    fn = jax.jit(fn)  # traced once, for its shapes and for the loop
    first = jax.tree.map(lambda leaf: leaf[0], xs)
    _, shapes, _ = jax.eval_shape(fn, carry, *first)
    zeros = jax.tree.map(
        lambda out: jnp.zeros(out.shape, jnp.promote_types(out.dtype, jnp.float32)),
        shapes,
    )

    def body(state: PyTree, x: tuple):
        carry, total = state
        carry, averaged, per_task = fn(carry, *x)
        return (carry, jax.tree.map(jnp.add, total, averaged)), per_task

    (carry, total), per_task = lax.scan(body, (carry, zeros), xs)
    mean = jax.tree.map(
        lambda x, out: (x / length).astype(jnp.result_type(out, 1.0)), total, shapes
    )
    return carry, mean, per_task


def in_chunks(
    meta_gradient: Callable, chunk_size: int, per_task_carry: bool
) -> Callable:
    """Make a ``meta_gradient`` of `MetaAlgorithm` take few tasks at a time.

    A carry for all tasks is given to every chunk, and the mean of what they make of it
    goes on, as over devices; one with a leading [T] is divided among them.

    Raises:
      ValueError: ``chunk_size`` is below 1 or, when called, does not divide T.
    """
    check_at_least("accumulate_tasks", chunk_size, 1)

    def chunked(params, carry, keys, episodes):
        num_tasks = keys.shape[0]
        if num_tasks % chunk_size:
            raise ValueError(
                f"accumulate_tasks={chunk_size} does not divide the {num_tasks} tasks "
                "of a meta-step (on one device)"
            )
        fold = lambda leaf: leaf.reshape(-1, chunk_size, *leaf.shape[1:])  # noqa: E731
        common, per_task = ((), carry) if per_task_carry else (carry, ())
        chunks = jax.tree.map(fold, (keys, episodes, per_task))

        def one_chunk(_, keys, episodes, per_task):
            carry = per_task if per_task_carry else common
            grads, carry, metrics = meta_gradient(params, carry, keys, episodes)
            last, per_task = ((), carry) if per_task_carry else (carry, ())
            return last, (grads, metrics, last), per_task

        last, (grads, metrics, mean), per_task = _scan_mean(one_chunk, common, chunks)
        if per_task_carry:
            carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), per_task)
        else:
            carry = jax.tree.map(
                lambda mean, x: mean.astype(x.dtype) if _is_inexact(x) else x,
                mean,
                last,
            )
        return grads, carry, metrics

    return chunked


def _is_inexact(x: jax.Array) -> bool:
    """Whether it has a mean: counters are the same in all, and must stay integers."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def over_mesh(gradient: Callable, mesh: Mesh, per_task_carry: bool) -> Callable:
    """Give each device its part of the tasks, and take the mean over the mesh.

    Args:
      gradient: ``(params, carry, keys [T], tasks [T], pool) -> (gradient, carry,
        metrics)``, of the tasks of one device.
      per_task_carry: the carry leads with [T], and is divided among the devices.

    Raises:
      ValueError: the mesh has no axis ``"task"`` or, when called, T is no multiple of
        it.
    """
    if "task" not in mesh.axis_names:
        raise ValueError(f"mesh has axes {mesh.axis_names}: one must be called 'task'")
    num_devices = mesh.shape["task"]

    def mean(x: jax.Array) -> jax.Array:
        return lax.pmean(x, mesh.axis_names) if _is_inexact(x) else x

    def on_one_device(params, carry, keys, tasks, pool):
        grads, carry, metrics = gradient(params, carry, keys, tasks, pool)
        if not per_task_carry:
            carry = jax.tree.map(mean, carry)
        return jax.tree.map(mean, grads), carry, jax.tree.map(mean, metrics)

    carry_spec = P("task") if per_task_carry else P()
    spread = sharding.spread(
        on_one_device,
        mesh,
        in_specs=(P(), carry_spec, P("task"), P("task"), P()),
        out_specs=(P(), carry_spec, P()),
    )

    def checked(params, carry, keys, tasks, pool):
        num_tasks = keys.shape[0]
        if num_tasks % num_devices:
            raise ValueError(
                f"the {num_tasks} tasks of a meta-step are not a multiple of the "
                f"mesh's {num_devices} devices: choose {num_devices}, "
                f"{2 * num_devices} and so on, or fewer devices"
            )
        return spread(params, carry, keys, tasks, pool)

    return checked
