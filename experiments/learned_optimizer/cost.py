"""What one update costs, in time and in memory, beside Adam's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.learned_optimizer.measuring import Optimizer

REPEATS = 101
_SHAPES = {"w1": (784, 20), "b1": (20,), "w2": (20, 10), "b2": (10,)}


def measure(rules: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Time a jitted update of a 784-20-10 MLP's parameters, optimizers in turn."""
    keys = jax.random.split(jax.random.key(0), len(_SHAPES))
    params = {
        name: 0.01 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, _SHAPES.items(), strict=True)
    }
    adam = optax.with_extra_args_support(optax.adam(1e-3))
    transforms = {"adam": adam} | {rule.name: rule.tx for rule in rules}
    states = {name: tx.init(params) for name, tx in transforms.items()}
    updates = {name: jax.jit(tx.update) for name, tx in transforms.items()}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    times: dict[str, list[float]] = {name: [] for name in transforms}
    for _ in range(REPEATS + 2):
        for name, update in updates.items():
            begun = time.perf_counter()
            jax.block_until_ready(
                update(grads, states[name], params, value=jnp.float32(1))
            )
            times[name].append(time.perf_counter() - begun)
    size = sum(p.size for p in jax.tree.leaves(params))
    # the first calls compile
    medians = {name: float(np.median(t[2:])) for name, t in times.items()}
    return [
        {
            "optimizer": name,
            "milliseconds": 1e3 * medians[name],
            "times_adam": medians[name] / medians["adam"],
            "state_bytes_per_parameter": _bytes(states[name]) / size,
        }
        for name in transforms
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| optimizer | one update, ms | times Adam's | state, bytes a parameter |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['optimizer']} | {row['milliseconds']:.3g} | "
            f"{row['times_adam']:.1f} | {row['state_bytes_per_parameter']:.0f} |"
        )
    return "\n".join(lines)


def _bytes(state: Any) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
