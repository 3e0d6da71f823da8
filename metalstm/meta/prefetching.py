"""Meta-training from a pool that is larger than the device's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from metalstm.base import Array, MetaAlgorithm
from metalstm.data.episodes import TaskSampler, episode_key
from metalstm.data.pools import ClassPool, in_tiles
from metalstm.meta.step import TrainState, make_train_loop
from metalstm.runtime import sharding

__all__ = ["make_prefetching_train_loop"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DrawnPool(ClassPool):
    """A pool of which only the examples that a call draws are on the device."""

    drawn: Array  # int32 [R], sorted: whose example is at each place of ``stored``

    def take(self, rows: Any) -> Array:
        return super().take(jnp.searchsorted(self.drawn, rows))


def make_prefetching_train_loop(
    algorithm: MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    spec: TaskSampler,
    *,
    num_tasks: int,
    steps_per_call: int = 1,
    mesh: Mesh | None = None,
    **options: Any,
) -> Callable[[TrainState, ClassPool], tuple[TrainState, dict[str, Array]]]:
    """`make_train_loop` for a pool in the host's memory: the same steps, to the bit.

    The pool is one of ``make_pool(..., in_host_memory=True)``. A device gets the
    examples that a call draws; while it computes, those of the next call are copied to
    it. A call therefore waits for the one before it, which matters little where a call
    has many steps.

    Args:
      spec: draws its examples by `ClassPool.take`, as those of `metalstm.data` do.
      options: of `make_train_loop`, as are the other arguments.
    """
    train = make_train_loop(
        algorithm,
        optimizer,
        spec,
        num_tasks=num_tasks,
        steps_per_call=steps_per_call,
        mesh=mesh,
        **options,
    )
    sampler = algorithm.train_sampler(spec)

    @jax.jit
    def rows_of(seed: Array, step: Array, pool: ClassPool) -> Array:
        """Sorted places of all examples of the call that starts at ``step``, [R]."""

        def of_task(step: Array, task: Array) -> Array:
            taken: list[Array] = []
            key = episode_key(seed, "train", step, task)
            sampler.sample(key, _recording(pool, taken))
            return jnp.concatenate(taken)

        steps, tasks = step + jnp.arange(steps_per_call), jnp.arange(num_tasks)
        every = jax.vmap(jax.vmap(of_task, (None, 0)), (0, None))(steps, tasks)
        return jnp.sort(every.ravel())

    ready: list[tuple[ClassPool, int, int, _DrawnPool]] = []

    def fetch(rows: Array, pool: ClassPool) -> _DrawnPool:
        host: Any = np.asarray(rows)
        fields = _fields(pool) | {"stored": in_tiles(np.asarray(pool.stored[host]))}
        return sharding.place(jax.device_put(_DrawnPool(**fields, drawn=host)), mesh)

    def run(state: TrainState, pool: ClassPool):
        none = jnp.zeros((), pool.stored.dtype)
        without_examples = dataclasses.replace(pool, stored=none)
        seed, step = state.seed, state.step
        following = rows_of(seed, step + steps_per_call, without_examples)
        # a step that was not finite is made again: so look where training is
        now = int(seed), int(step)
        found = ready.pop() if ready else None
        if found is not None and found[0] is pool and found[1:3] == now:
            drawn = found[3]
        else:
            drawn = fetch(rows_of(seed, step, without_examples), pool)
        stepped = train(state, drawn)
        coming = now[0], now[1] + steps_per_call
        ready.append((pool, *coming, fetch(following, pool)))
        return stepped

    return run


def _recording(pool: ClassPool, taken: list[Array]) -> ClassPool:
    """A pool that notes which examples are taken of it, and has none."""

    class Recording(ClassPool):
        def take(self, rows: Array | slice) -> Array:
            taken.append(jnp.asarray(rows).ravel())
            return jnp.zeros((len(taken[-1]), *self.shape), self.stored.dtype)

    return Recording(**_fields(pool))


def _fields(pool: ClassPool) -> dict[str, Any]:
    return {f.name: getattr(pool, f.name) for f in dataclasses.fields(pool)}
