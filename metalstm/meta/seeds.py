"""Several meta-training seeds at once, where one alone leaves the machine idle.

The published recipes have one task in a meta-step. That fills neither a data-centre
GPU, which takes all seeds in each operation, nor a CPU, whose cores take one each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from metalstm.base import Array, MetaAlgorithm, PyTree
from metalstm.meta.step import TrainState, init_train_state
from metalstm.runtime import sharding
from metalstm.runtime.compilation import Jitted
from metalstm.tasks import map_tasks

__all__ = ["init_seeds", "map_seeds"]


def init_seeds(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    seeds: Iterable[int] | Array,
    episode: PyTree,
) -> TrainState:
    """`init_train_state` for each of S ``seeds``: a leading [S] on every leaf.

    Raises:
      ValueError: there is no seed.
    """
    states = [init_train_state(algorithm, optimizer, s, episode) for s in seeds]
    if not states:
        raise ValueError("seeds is empty: give at least one")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def map_seeds(
    train_loop: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
    *,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """``train_loop`` for S seeds in one jitted call: ``(states, pool) -> ...``.

    Each seed takes the steps that it takes alone, to rounding: nothing travels between
    them, and one whose loss is not finite stays where it was while the others continue.
    A device's seeds are vmapped on an accelerator, and computed one after another on a
    CPU.

    Args:
      train_loop: from `make_train_loop` without a mesh.
      mesh: spreads the seeds over its ``"task"`` axis, as
        ``metalstm.runtime.sharding.task_mesh(S)`` has it; ``place(states, mesh,
        per_task=True)`` puts the states there, ``place(pool, mesh)`` the pool.

    Returns:
      ``(states, metrics)``, all with a leading [S]; one seed's state is
      ``jax.tree.map(lambda leaf: leaf[i], states)``. The states are donated.

    Raises:
      ValueError: the mesh has another axis than ``"task"``, or, when called, does not
        divide the seeds.
    """
    if mesh is not None and mesh.axis_names != ("task",):
        raise ValueError(
            f"mesh has axes {mesh.axis_names}: seeds are spread over one axis, 'task'; "
            "omit devices_per_task"
        )

    def on_one_device(states: TrainState, pool: Any):
        return map_tasks(lambda state: train_loop(state, pool), states)

    if mesh is None:
        return Jitted(on_one_device, donate_argnums=0)
    spread = sharding.spread(on_one_device, mesh, (P("task"), P()), P("task"))

    def on_all(states: TrainState, pool: Any):
        (num_seeds,) = states.seed.shape
        if num_seeds % mesh.size:
            raise ValueError(
                f"{num_seeds} seeds are not a multiple of the mesh's {mesh.size} "
                f"devices: choose {mesh.size}, {2 * mesh.size} and so on, or "
                f"task_mesh({num_seeds})"
            )
        return spread(states, pool)

    return Jitted(on_all, donate_argnums=0)
