"""The rows that `benchmarks.gpu` measures, each a function of no arguments."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import episodes, learned_optimizers, rows
from benchmarks.rows import Recipe

__all__ = ["PEAKS", "Peak", "compare", "peak_of", "rows_of"]


class Peak(NamedTuple):
    """Of a device, by its data sheet, without sparsity."""

    bfloat16: float  # TFLOP/s of matrix products
    tensorfloat32: float
    float32: float
    memory: float  # GB/s


# by what JAX calls the device; the first that fits
PEAKS = {
    "H200": Peak(989, 495, 67, 4800),
    "H100 PCIe": Peak(756, 378, 51, 2000),
    "H100": Peak(989, 495, 67, 3350),
    "A100": Peak(312, 156, 19.5, 1555),
    "L40S": Peak(362, 183, 91.6, 864),
    "L4": Peak(121, 60, 30.3, 300),
}

# name -> (row, tasks of a meta-step), the quickest to compile first
_PROTOTYPICAL = {"image": (84, 3), "shot": 5, "steps": 1, "rule": "compare"}
NUMERICS: dict[str, tuple[dict, int]] = {
    "prototypical": (_PROTOTYPICAL, 1),
    "L2L": (learned_optimizers.ROWS["mnist-mlp-tbptt"], 1),
    "PES": (learned_optimizers.ROWS["mnist-mlp-pes"], 1),
    "Meta-LSTM, first order": (episodes.ROWS["mini-1shot"] | {"steps": 3}, 1),
    "Meta-LSTM, second order": (episodes.ROWS["omniglot-lstm-second-order"], 2),
    "MAML, second order": (episodes.ROWS["maml-conv4-64-1step"], 2),
}
_SPEED = {
    "prototypical": (_PROTOTYPICAL, 1),
    "mini-1shot": (episodes.ROWS["mini-1shot"], 1),
    "mini-5shot": (episodes.ROWS["mini-5shot"], 1),
    "maml-conv4-64-5steps": (episodes.ROWS["maml-conv4-64-5steps"], 4),
} | {
    name: (row, 1 if row["problem"] == "mlp" else 128)
    for name, row in learned_optimizers.ROWS.items()
    if "seeds" not in row
}


def rows_of(
    part: str, small: bool, peak: Sequence[float] | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The rows of a part of `benchmarks.gpu`, by name, in the order to measure them."""
    best = Peak(*peak) if peak else peak_of(jax.devices()[0].device_kind)
    if part == "limits":
        return _limits(256 if small else 8192, best)
    if part == "numerics":
        return {
            name: functools.partial(compare, _sized(row, small), tasks)
            for name, (row, tasks) in NUMERICS.items()
        }
    many, some = (2, 1) if small else (16, 4)
    order = [(1, None), (many, None), (some, None), (many, "bfloat16"), (1, "float32")]
    return {
        f"{name}, {seeds} seed{'s' * (seeds > 1)}, {precision or 'default'}": (
            functools.partial(
                _speed, _sized(row, small), tasks, seeds, precision, best, small
            )
        )
        for seeds, precision in order
        for name, (row, tasks) in _SPEED.items()
        if precision is None or name in ("prototypical", "mini-1shot")
    }


def peak_of(device_kind: str) -> Peak | None:
    """Return the peak of a device, None where it is not known."""
    return next((PEAKS[name] for name in PEAKS if name in device_kind), None)


def _sized(row: dict, small: bool) -> dict:
    if not small or "problem" in row:
        return row
    return row | {"image": (16, row["image"][1]), "filters": 4, "steps": 1}


def _recipe(row: dict, tasks: int) -> Recipe:
    if "problem" in row:
        return learned_optimizers.build(row, None, tasks, num_images=1000)
    return episodes.build(row)


def _limits(size: int, peak: Peak | None) -> dict[str, Callable[[], dict[str, Any]]]:
    def product(dtype: Any, precision: str, best: float | None) -> dict[str, Any]:
        x = jnp.full((size, size), 0.5, dtype)
        with jax.default_matmul_precision(precision):
            seconds = _fastest(jax.jit(jnp.matmul), x, x)
        return _measured(2e-12 * size**3 / seconds, best)

    def copy() -> dict[str, Any]:
        x = jnp.ones(4 * size * size, jnp.float32)
        seconds = _fastest(jax.jit(lambda x: x + 1), x)
        return _measured(8e-9 * x.size / seconds, peak and peak.memory)

    bf16, tf32, f32, _ = peak or (None, None, None, None)
    part = functools.partial
    return {
        "product, bfloat16": part(product, jnp.bfloat16, "default", bf16),
        "product, TensorFloat-32": part(product, jnp.float32, "default", tf32),
        "product, float32": part(product, jnp.float32, "float32", f32),
        "copy": copy,
    }


def _measured(speed: float, peak: float | None) -> dict[str, Any]:
    device = jax.devices()[0].device_kind
    return {"measured": speed, "of the peak": _share(speed, peak), "device": device}


def _share(speed: float, peak: float | None) -> str | None:
    return f"{speed / peak:.1%}" if peak else None


def _fastest(fn: Callable, *args: Any) -> float:
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - start)
    return min(found)


def compare(row: dict, tasks: int) -> dict[str, Any]:
    """Relative differences of a meta-gradient to the CPU's, by precision.

    Parameters and episodes are made on the CPU, in whose forms and in float32 the
    reference is computed.
    """
    from metalstm import init_train_state
    from metalstm.runtime.compilation import traced_for

    recipe = _recipe(row, tasks)
    algorithm, sampler = (
        recipe.algorithm,
        recipe.algorithm.train_sampler(recipe.sampler),
    )
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]

    @jax.jit
    def meta_gradient(*args: Any) -> jax.Array:
        gradient, _, _ = algorithm.meta_gradient(*args)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])

    with jax.default_device(cpu), traced_for("cpu"):
        data = jax.device_put(recipe.data, cpu)
        keys = jax.random.split(jax.random.key(0), tasks)
        episode = jax.jit(
            lambda keys, d: jax.vmap(lambda k: sampler.sample(k, d))(keys)
        )(keys, data)
        one = jax.tree.map(lambda leaf: leaf[0], episode)
        state = init_train_state(algorithm, recipe.optimizer, 0, one)
        args = jax.device_put((state.params, state.carry, keys, episode), cpu)
        with jax.default_matmul_precision("float32"):
            expected = jax.device_get(meta_gradient(*args))
    args = jax.device_put(args, device)
    found: dict[str, Any] = {"numbers": expected.size}
    for precision in (None, "float32", "bfloat16"):
        with jax.default_matmul_precision(precision):
            gradient = jax.device_get(meta_gradient(*args))
        difference = ((gradient - expected) ** 2).sum() ** 0.5
        relative = float(difference / (expected**2).sum() ** 0.5)
        found[precision or "default"] = f"{relative:.1e}"
    return found


def _speed(
    row: dict,
    tasks: int,
    seeds: int,
    precision: str | None,
    peak: Peak | None,
    small: bool,
) -> dict[str, Any]:
    recipe = _recipe(row, tasks)
    steps = row.get("steps_per_call", 1)
    if "problem" in row:
        steps = 2 if small else learned_optimizers.STEPS_PER_CALL
    with jax.default_matmul_precision(precision):
        train, state = rows.started(
            recipe, seeds=seeds, mesh=None, num_tasks=tasks, steps_per_call=steps
        )
        kept = [state]

        def step() -> Any:
            kept[0], metrics = train(kept[0], recipe.data)
            return metrics

        timed = rows.timed(step, 0.1 if small else 3)
    if "problem" in row:
        rate, gflop = seeds * steps / timed["seconds"], learned_optimizers.gflop(row)
    else:
        rate = seeds * steps * tasks / timed["seconds"]
        # of the learner alone: a task does not adapt the rule
        params = getattr(kept[0].params, "learner", kept[0].params).params
        size = sum(leaf.size for leaf in jax.tree.leaves(params)) // seeds
        gflop = episodes.episode_gflop(row, size)
    memory = jax.local_devices()[0].memory_stats() or {}
    best = peak and getattr(peak, precision or "tensorfloat32")
    return {
        "per s": rate,
        "TFLOP/s": 1e-3 * rate * gflop,
        "of the peak": _share(1e-3 * rate * gflop, best),
        "GiB so far": memory.get("peak_bytes_in_use", 0) / 2**30,
        "compile s": timed["compile_s"],
        "seconds a call": timed["seconds"],
    }
