"""What the TPU compiler says of the main programs, without a TPU: nothing runs.

    python -m benchmarks.tpu                                # every program, v5e, 1 chip
    python -m benchmarks.tpu maml --chip v6e --chips 1 16   # those with this in the name
    python -m benchmarks.tpu --check                        # fails where one got worse

Needs the compiler: pip install "jax[tpu]". Each program is a whole meta-step of a
recipe of `benchmarks.episodes` or `benchmarks.learned_optimizers`, sampling included,
on pools of the published size, with one task a device unless its name has another
number. The same versions give the same numbers every time, compile times excepted.

"cycles" are the compiler's estimates for one episode on one device (of learned
optimizers, one meta-step of a task), loops multiplied out; what it has no estimate for,
the collectives among them, counts nothing. "matrix" is the share of the matrix units'
peak at which the episode's arithmetic would run in these cycles. Memory is a device's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import episodes, hlo, learned_optimizers
from benchmarks.rows import Recipe

__all__ = ["CHIPS", "PROGRAMS", "compiled"]


class Chip(NamedTuple):
    flops: int  # bfloat16 multiplications and additions a cycle, of the matrix units
    hertz: float  # such that flops * hertz is the published peak
    topologies: dict[int, str]


_GRIDS = {1: "1x1", 4: "2x2", 16: "4x4", 256: "16x16"}
CHIPS = {
    "v5e": Chip(4 * 2 * 128**2, 1.5e9, {n: f"v5e:{g}" for n, g in _GRIDS.items()}),
    "v6e": Chip(4 * 2 * 256**2, 1.75e9, {n: f"v6e:{g}" for n, g in _GRIDS.items()}),
}


class Program(NamedTuple):
    row: dict
    classes: int  # of the pool of the published data set
    per_class: int
    tasks: int = 1  # of a meta-step, for each device


_MINI, _OMNIGLOT = (64, 600), (964, 20)
_MAML = episodes.ROWS["maml-conv4-64-5steps"]
_COMPARE = {"image": (84, 3), "shot": 5, "steps": 1, "rule": "compare"}
_MNIST = (10, 6000)
PROGRAMS = {
    "meta-lstm-1shot": Program(episodes.ROWS["mini-1shot"], *_MINI),
    "meta-lstm-5shot": Program(episodes.ROWS["mini-5shot"], *_MINI),
    "meta-lstm-5shot-second-order": Program(
        episodes.ROWS["mini-5shot-second-order"], *_MINI
    ),
    "maml-4tasks": Program(_MAML, *_OMNIGLOT, tasks=4),
    "maml-16tasks": Program(_MAML, *_OMNIGLOT, tasks=16),
    "prototypical-5shot": Program(_COMPARE, *_MINI),
    "l2l-mlp": Program(learned_optimizers.ROWS["mnist-mlp-tbptt"], *_MNIST),
    "pes-mlp": Program(learned_optimizers.ROWS["mnist-mlp-pes"], *_MNIST),
}


def compiled(name: str, chip: str, chips: int) -> dict[str, Any]:
    """Compile one program and return what its compiler says; nothing runs."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from metalstm import make_train_loop
    from metalstm.runtime.compilation import traced_for

    program = PROGRAMS[name]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip].topologies[chips]
    ).devices
    mesh = Mesh(np.array(devices).reshape(-1), ("task",)) if chips > 1 else None
    num_tasks = chips * program.tasks
    recipe = _recipe(program, num_tasks)
    with traced_for("tpu"):
        train = make_train_loop(*recipe[:3], num_tasks=num_tasks, mesh=mesh)
        begun = time.perf_counter()
        lowered = train.lower(*_arguments(recipe, devices, mesh))  # type: ignore[attr-defined]
        traced = time.perf_counter() - begun
        program_text = lowered.compile()
    seconds = time.perf_counter() - begun - traced
    memory = program_text.memory_analysis()
    text = program_text.as_text()
    del jax
    return {
        "program": name,
        "chip": chip,
        "chips": chips,
        "traced_s": traced,
        "compile_s": seconds,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
    } | _figures(program, CHIPS[chip], recipe, text)


def _recipe(program: Program, num_tasks: int) -> Recipe:
    row = program.row
    if "problem" in row:
        images = program.classes * program.per_class
        return learned_optimizers.build(row, None, num_tasks, images)
    # a pool of 20 images a class has the structure; only the number of rows is larger
    recipe = episodes.build(row, program.classes, per_class=20)
    images = _of_length(recipe.data.images, program.classes * program.per_class)
    return recipe._replace(data=dataclasses.replace(recipe.data, images=images))


def _of_length(x: Any, length: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype)


def _arguments(recipe: Recipe, devices: Any, mesh: Any) -> tuple[Any, Any]:
    """Shapes of a state and of the data, and where they are."""
    import jax
    from jax.sharding import NamedSharding, SingleDeviceSharding
    from jax.sharding import PartitionSpec as P

    from metalstm import init_train_state

    algorithm, optimizer, sampler, data = recipe

    def start(data: Any) -> Any:
        episode = sampler.sample(jax.random.key(0), data)
        return init_train_state(algorithm, optimizer, 0, episode)

    def put(tree: Any, spec: Any) -> Any:
        where = NamedSharding(mesh, spec) if mesh else SingleDeviceSharding(devices[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
        )

    state = jax.eval_shape(start, data)
    carry = put(state.carry, P("task") if algorithm.per_task_carry else P())
    return put(state._replace(carry=()), P())._replace(carry=carry), put(data, P())


def _figures(program: Program, chip: Chip, recipe: Recipe, text: str) -> dict:
    found = hlo.operations(text)
    cycles = sum(op.cycles for op in found) / program.tasks
    pool = max(x.size * x.dtype.itemsize for x in _leaves(recipe.data))
    copies = [
        op
        for op in found
        if hlo.array_bytes(op.shape) >= pool // 2 and op.kind in ("copy", "fusion")
    ]
    return {
        "cycles": round(cycles),
        "ms": 1e3 * cycles / chip.hertz,
        "matrix_share": 1e9 * _gflop(program, recipe) / chip.flops / cycles,
        "collectives": hlo.collectives(found),
        "pool_copies": [str(op) for op in copies],
        "six_dimensional": sum(
            op.cycles for op in found if _rank(op.shape) >= 6
        ) / program.tasks,
        "costliest": [
            (op.cycles / program.tasks / cycles, str(op)) for op in _costliest(found)
        ],
    }


def _leaves(tree: Any) -> list:
    import jax

    return jax.tree.leaves(tree)


def _rank(shape: str) -> int:
    sizes = shape.partition("[")[2].partition("]")[0]
    return len(sizes.split(","))


def _costliest(found: list[hlo.Operation], number: int = 5) -> list[hlo.Operation]:
    return sorted(found, key=lambda op: (-op.cycles, op.name))[:number]


def _gflop(program: Program, recipe: Recipe) -> float:
    if "problem" in program.row:
        return learned_optimizers.gflop(program.row)
    import jax

    def start(data: Any) -> Any:
        episode = recipe.sampler.sample(jax.random.key(0), data)
        return recipe.algorithm.init(jax.random.key(0), episode)

    learner = jax.eval_shape(start, recipe.data).learner.params
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(learner))
    return episodes.episode_gflop(program.row, sum(sizes))
