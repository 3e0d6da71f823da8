"""Several seeds of a run at once, on machines that one of them leaves idle."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import metalstm
from metalstm.meta.fitting import Call, Stepped
from metalstm.runtime import sharding

__all__ = ["drive_together", "gains_from_seeds", "seeds_mesh"]

Returned = TypeVar("Returned")


def gains_from_seeds() -> bool:
    """Whether seeds at once are faster: on an accelerator, and on several devices.

    A single CPU device computes them one after another anyway, and several processes
    share each step.
    """
    several = len(jax.devices()) > 1 or jax.default_backend() != "cpu"
    return several and jax.process_count() == 1


def seeds_mesh(num_seeds: int, num_devices: int | None) -> Mesh | None:
    """The devices that share seeds: ``num_devices``, or as many as there are seeds."""
    if num_devices is None:
        num_devices = min(num_seeds, len(jax.devices()))
    return sharding.task_mesh(num_devices=num_devices)


def drive_together(
    runs: Sequence[Generator[Call, Stepped, Returned]], mesh: Mesh | None
) -> list[Returned]:
    """Drive the generators, calls of the same train loop as one; see `fit_steps`.

    Args:
      runs: of one seed each.
      mesh: of one axis, whose devices share the seeds. Those that it does not divide
        are computed without it.

    Returns:
      What each of them returns.

    Raises:
      Exception: the first of those that the generators raised, once the others, which
        continue, have ended.
    """
    asked: dict[int, Call] = {}
    returned: dict[int, Returned] = {}
    errors: list[Exception] = []
    together = functools.cache(_together)

    def resume(index: int, answer: Stepped | None) -> None:
        asked.pop(index, None)
        try:
            asked[index] = runs[index].send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            returned[index] = end.value
        except Exception as error:
            errors.append(error)

    for index in range(len(runs)):
        resume(index, None)
    while asked:
        loop = next(iter(asked.values())).train_loop
        alike = [i for i, call in sorted(asked.items()) if call.train_loop is loop]
        divided = len(alike) - (len(alike) % mesh.size if mesh is not None else 0)
        for some, devices in ((alike[:divided], mesh), (alike[divided:], None)):
            # to where the pool is
            states = [sharding.place(asked[index].state, mesh) for index in some]
            if len(states) < 2:
                answers = [loop(state, asked[some[0]].pool) for state in states]
            else:
                at_once = together(loop, devices)
                answers = at_once(tuple(states), asked[some[0]].pool)
            for index, answer in zip(some, answers, strict=True):
                resume(index, answer)
    if errors:
        raise errors[0]
    return [returned[index] for index in range(len(runs))]


def _together(train_loop: Any, mesh: Mesh | None) -> Any:
    """``(states, pool) -> [(state, metrics)]`` of a train loop, one program."""
    of_seeds = metalstm.map_seeds(train_loop, mesh=mesh)

    def run(states: tuple[Any, ...], pool: Any) -> list[Stepped]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        found = of_seeds(stacked, pool)
        return [jax.tree.map(lambda leaf: leaf[i], found) for i in range(len(states))]  # noqa: B023

    return jax.jit(run, donate_argnums=0)
