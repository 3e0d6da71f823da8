"""Meta-steps per second of learned optimizers, next to the machine's matrix product.

    python -m benchmarks.learned_optimizers             # every row
    python -m benchmarks.learned_optimizers quadratics  # rows whose name has the word

One meta-step is an unroll of 20 updates and its gradient. There is one device to a core
(`--cpu-devices`): they split the tasks, the coordinates of the one task
(`--devices-per-task`), or several seeds (`metalstm.map_seeds`), whose rate is of all
together. A row's arithmetic is counted below; `benchmarks.rows` says what the columns
are. Images are random, which does not change the speed.
"""

from __future__ import annotations

from typing import Any

from benchmarks import rows
from benchmarks.rows import Recipe, Target

__all__ = ["ROWS", "TARGETS", "build", "gflop"]

UNROLL, HIDDEN, BATCH = 20, 20, 128
STEPS_PER_CALL = 10  # what starts a call is a tenth of a step on quadratics
# 10-dimensional functions, 128 of them; 784-20-10, one task
ROWS = {
    "quadratics-tbptt": {"problem": "quadratics", "estimator": "backprop"},
    "quadratics-pes": {"problem": "quadratics", "estimator": "pes"},
    "mnist-mlp-tbptt": {"problem": "mlp", "estimator": "backprop"},
    "mnist-mlp-pes": {"problem": "mlp", "estimator": "pes"},
    "mnist-mlp-tbptt-8seeds": {"problem": "mlp", "estimator": "backprop", "seeds": 8},
    "mnist-mlp-pes-8seeds": {"problem": "mlp", "estimator": "pes", "seeds": 8},
}
# public JAX implementations' meta-steps per second
TARGETS = {
    "quadratics-tbptt": Target(8.6, times=7),
    "quadratics-pes": Target(13.0, times=7),
    "mnist-mlp-tbptt": Target(2.05, times=3),
    "mnist-mlp-pes": Target(3.5, times=3),
    "mnist-mlp-tbptt-8seeds": Target(2.05, times=3),
    "mnist-mlp-pes-8seeds": Target(3.5, times=3),
}


def gflop(row: dict) -> float:
    """Arithmetic of one meta-step, in GFLOP: two LSTM layers a coordinate, the problem.

    Truncated back-propagation takes three times the rule's forward pass, an antithetic
    pair two. The problem itself is small compared with it: W theta twice a step, or the
    network's forward and backward.
    """
    mlp = row["problem"] == "mlp"
    coordinates = 784 * 20 + 20 + 20 * 10 + 10 if mlp else 128 * 10
    layers = (2 + HIDDEN) + (HIDDEN + HIDDEN)
    per_coordinate = 2 * 4 * HIDDEN * layers + 2 * HIDDEN
    passes = 3 if row["estimator"] == "backprop" else 2
    rule = passes * UNROLL * coordinates * per_coordinate
    weights = coordinates if mlp else 128 * 100
    inner = UNROLL * weights * 2 * 3 * (BATCH if mlp else 1)
    if row["estimator"] == "pes":
        inner *= 2
    return (rule + inner) / 1e9


def build(row: dict, mesh: Any, num_tasks: int, num_images: int = 10_000) -> Recipe:
    """The recipe of a row, on random images."""
    import jax.numpy as jnp
    import numpy as np

    from metalstm import adam_clipped, learned_optimizers, rules
    from metalstm.data.sources.labelled import ImageData
    from metalstm.learned_optimizers import problems
    from metalstm.runtime.sharding import shared_axis

    rng = np.random.default_rng(0)
    if row["problem"] == "mlp":
        family = problems.mlp_classifier(batch_size=BATCH)
        x = rng.integers(0, 256, (num_images, 28, 28, 1), dtype=np.uint8)
        y = rng.integers(0, 10, num_images).astype(np.int32)
        data = ImageData(jnp.asarray(x), jnp.asarray(y))
    else:
        family, data = problems.quadratics(10), ()
    algorithm = learned_optimizers.learned_optimizer(
        family,
        rules.l2l(hidden_size=HIDDEN, num_layers=2),
        num_tasks=num_tasks,
        unroll_steps=UNROLL,
        horizon=5 * UNROLL,
        estimator=row["estimator"],
        axis_name=shared_axis(mesh),
    )
    sampler = problems.ProblemSampler(family, UNROLL + 1)
    return Recipe(algorithm, adam_clipped(1e-3, 1.0), sampler, data)


def measure(name: str, seconds: float) -> dict:
    """Time one row in this process."""
    from metalstm.runtime.sharding import place

    row = ROWS[name]
    tasks, seeds = 1 if row["problem"] == "mlp" else 128, row.get("seeds", 1)
    mesh = rows.one_device_to_a_core(tasks * seeds, share_one=True)
    recipe = build(row, mesh, tasks)
    data = place(recipe.data, mesh)
    train, state = rows.started(
        recipe, seeds=seeds, mesh=mesh, num_tasks=tasks, steps_per_call=STEPS_PER_CALL
    )
    state_now = [state]

    def step():
        state_now[0], metrics = train(state_now[0], data)
        return metrics

    result = rows.timed(step, seconds)
    rate = seeds * STEPS_PER_CALL / result["seconds"]
    share = rate * gflop(row) / max(result["probe"])
    return result | {"row": name, "rate": rate, "share": share}


if __name__ == "__main__":
    rows.run(__doc__, {"benchmarks.learned_optimizers": (ROWS, TARGETS)}, measure)
