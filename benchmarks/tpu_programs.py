"""The main programs compiled for TPUs, ahead of time and without one.

Each is a whole meta-step, sampling included, on data of the published size. Its shapes
alone are given to the compiler, so nothing runs and nothing is read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

from benchmarks import episodes, hlo, learned_optimizers
from benchmarks.rows import Recipe
from benchmarks.scaling import Link, ring_seconds

__all__ = [
    "CHIPS",
    "PROGRAMS",
    "Chip",
    "Program",
    "compile_program",
    "exchange_ms",
    "figures",
    "gflop",
    "start_compiler",
]


class Chip(NamedTuple):
    """A generation of TPUs."""

    side: int  # of its matrix units
    hertz: float
    bandwidth: float  # of its memory (HBM), bytes a second, published
    topologies: dict[int, str]  # by number of chips, a square of them
    link: Link  # to each of four neighbours: published bandwidth, ASSUMED latency

    @property
    def flops(self) -> int:
        """Of four matrix units in a cycle, bfloat16; times hertz the published peak."""
        return 4 * 2 * self.side**2


_GRIDS = {1: "1x1", 16: "4x4", 256: "16x16"}
CHIPS = {
    "v5e": Chip(
        128,
        1.5e9,
        819e9,
        {n: f"v5e:{g}" for n, g in _GRIDS.items()},
        Link(50e9, 1e-6),
    ),
    "v6e": Chip(
        256,
        1.75e9,
        1640e9,
        {n: f"v6e:{g}" for n, g in _GRIDS.items()},
        Link(100e9, 1e-6),
    ),
}


class Program(NamedTuple):
    """A meta-step of a benchmark's recipe."""

    row: dict  # of `benchmarks.episodes` or `benchmarks.learned_optimizers`
    classes: int  # of the data it draws from
    per_class: int
    tasks: int = 1  # of a meta-step, on each device


_MINI, _OMNIGLOT, _MNIST = (64, 600), (964, 20), (10, 6000)
_MAML = episodes.ROWS["maml-conv4-64-5steps"]
_COMPARE = {"image": (84, 3), "shot": 5, "steps": 1, "rule": "compare"}
PROGRAMS = {
    "meta-lstm-1shot": Program(episodes.ROWS["mini-1shot"], *_MINI),
    "meta-lstm-1shot-16tasks": Program(episodes.ROWS["mini-1shot"], *_MINI, tasks=16),
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


def start_compiler() -> None:
    """Make JAX ready to compile for TPUs; before anything else uses it.

    Raises:
      SystemExit: the compiler is not installed.
    """
    # nothing here touches a device: not to look for one, nor to lock it
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "error: libtpu, the TPU compiler, is not installed: pip install "
            f"'jax[tpu]=={jax.__version__}' (Linux only; no TPU is needed)"
        )
    # a program that was read would have no compile time
    jax.config.update("jax_enable_compilation_cache", False)


def compile_program(name: str, chip: str, chips: int) -> tuple[dict[str, Any], str]:
    """Compile a program; return its figures, and its text as compiled.

    The figures are: program, chip, chips, `exchange_ms`; cycles of an episode and the
    milliseconds they take; the shares of drawing it and of the matrix units; bytes of
    arguments and temporaries; collectives by kind (number, bytes); the costliest
    operations, those that make a copy of the pool; bytes an episode that are written
    without an estimate; cycles of arrays of six axes; seconds of tracing and compiling.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    from metalstm import make_train_loop
    from metalstm.runtime.compilation import traced_for

    program = PROGRAMS[name]
    topology = CHIPS[chip].topologies[chips]
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = None
    if chips > 1:
        mesh = jax.sharding.Mesh(np.array(devices).reshape(-1), ("task",))
    recipe = _recipe(program, chips * program.tasks)
    begun = time.perf_counter()
    with traced_for("tpu"):
        train = make_train_loop(*recipe[:3], num_tasks=chips * program.tasks, mesh=mesh)
        lowered = train.lower(*_arguments(recipe, devices, mesh))  # type: ignore[attr-defined]
        traced = time.perf_counter()
        compiled = lowered.compile()
    finished = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = figures(name, chip, text)
    return found | {
        "program": name,
        "chip": chip,
        "chips": chips,
        "exchange_ms": exchange_ms(found["collectives"], chip, chips),
        "traced_s": traced - begun,
        "compile_s": finished - traced,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
    }, text


def exchange_ms(
    collectives: dict[str, tuple[int, int]], chip: str, chips: int
) -> float:
    """The milliseconds of a step's exchanges by the model of `benchmarks.scaling`.

    Each is a ring along either axis of the square of chips, one after the other.
    """
    side, link = math.isqrt(chips), CHIPS[chip].link
    return 2e3 * sum(
        number * ring_seconds(size // number // 4, side, link)
        for number, size in collectives.values()
    )


def figures(name: str, chip: str, text: str) -> dict[str, Any]:
    """What the text of a compiled program says; see `compile_program`."""
    program = PROGRAMS[name]
    found = hlo.operations(text)
    cycles = sum(op.cycles for op in found) / program.tasks
    flops = 1e9 * gflop(program)
    ranked = sorted(found, key=lambda op: (-op.cycles, op.name))
    # of images: a rule's states and stacked 3x3 kernels may have as many axes
    cells = [op for op in found if hlo.rank(op.shape) > 5 and ",3,3," not in op.shape]
    if "image" not in program.row:
        cells = []
    return {
        "cycles": round(cycles),
        "ms": 1e3 * cycles / CHIPS[chip].hertz,
        "sampling_share": sum(
            op.cycles for op in found if re.search(r"\bsample\b", op.path)
        )
        / (cycles * program.tasks),
        "matrix_share": flops / (cycles * CHIPS[chip].flops),
        "collectives": hlo.collectives(found),
        "costliest": [
            (op.cycles / program.tasks / cycles, str(op)) for op in ranked[:5]
        ],
        "pool_copies": [str(op) for op in found if _copies_pool(op, program)],
        "unestimated_bytes": hlo.without_estimate(found) // program.tasks,
        "six_axes_cycles": round(sum(op.cycles for op in cells) / program.tasks),
    }


def _copies_pool(op: hlo.Operation, program: Program) -> bool:
    size, channels = program.row.get("image", (28, 1))
    pool_bytes = program.classes * program.per_class * size**2 * channels
    is_large = hlo.array_bytes(op.shape) >= pool_bytes
    writes = op.kind in ("copy", "fusion", "reshape", "transpose")
    return writes and is_large and op.shape.startswith("u8[")


def _recipe(program: Program, num_tasks: int) -> Recipe:
    import jax

    if "problem" in program.row:
        num_images = program.classes * program.per_class
        return learned_optimizers.build(program.row, None, num_tasks, num_images)
    recipe = episodes.build(program.row, program.classes, per_class=20)
    # the same pool, were its classes as large as the published ones
    stored = recipe.data.stored
    number = program.classes * program.per_class
    full = jax.ShapeDtypeStruct((number, *stored.shape[1:]), stored.dtype)
    return recipe._replace(data=dataclasses.replace(recipe.data, stored=full))


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


def gflop(program: Program) -> float:
    """Arithmetic of an episode, or of a task's meta-step."""
    if "problem" in program.row:
        return learned_optimizers.gflop(program.row)
    import jax
    import jax.numpy as jnp

    from metalstm import nn

    size, channels = program.row["image"]
    learner = nn.conv4(5, program.row.get("filters", 32))
    image = jnp.zeros((1, size, size, channels))
    params = jax.eval_shape(learner.init, jax.random.key(0), image).params
    return episodes.episode_gflop(
        program.row, sum(leaf.size for leaf in jax.tree.leaves(params))
    )
