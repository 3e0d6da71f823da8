"""Episodes per second of whole meta-steps, as a share of what the machine can do.

    python -m benchmarks.episodes            # every row
    python -m benchmarks.episodes mini-5shot # rows whose name contains the word

Rows of several tasks run on one device to a core, as `--cpu-devices` has it, and so do
rows of several seeds (`metalstm.map_seeds`), whose rate is that of all together. A
row's arithmetic is counted below; `benchmarks.rows` says what the columns are. Images
are random, which does not change the speed.
"""

from __future__ import annotations

import time

from benchmarks import rows
from benchmarks.rows import Recipe, Target

__all__ = ["ROWS", "TARGETS", "build", "episode_gflop", "learner_gflop"]

_MINI = {"image": (84, 3), "tasks": 1}
_LSTM = {"image": (28, 1), "shot": 1, "steps": 3, "tasks": 4, "downsample": "stride"}
_MAML = {"image": (28, 1), "shot": 1, "tasks": 4, "filters": 64, "rule": "sgd"}
_MAML |= {"second_order": True, "steps_per_call": 10}  # a call costs a millisecond
ROWS: dict[str, dict] = {
    "mini-1shot": _MINI | {"shot": 1, "steps": 12},
    "mini-5shot": _MINI | {"shot": 5, "steps": 8},
    "mini-1shot-8seeds": _MINI | {"shot": 1, "steps": 12, "seeds": 8},
    "mini-5shot-8seeds": _MINI | {"shot": 5, "steps": 8, "seeds": 8},
    "mini-5shot-second-order": _MINI | {"shot": 5, "steps": 8, "second_order": True},
    "omniglot-lstm-first-order": _LSTM,
    "omniglot-lstm-second-order": _LSTM | {"second_order": True},
    "maml-conv4-64-1step": _MAML | {"steps": 1},
    "maml-conv4-64-5steps": _MAML | {"steps": 5},
    "maml-strided-64-1step": _MAML | {"steps": 1, "downsample": "stride"},
    "maml-strided-64-5steps": _MAML | {"steps": 5, "downsample": "stride"},
}
# A public PyTorch implementation's episodes (tasks) per second in meta-training.
TARGETS = {
    "mini-1shot": Target(1.03, share=0.35),
    "mini-5shot": Target(0.70, share=0.35),
    "mini-1shot-8seeds": Target(1.03, share=0.35),
    "mini-5shot-8seeds": Target(0.70, share=0.35),
    "maml-conv4-64-1step": Target(7.9, times=2),
    "maml-conv4-64-5steps": Target(4.9, times=2),
    "maml-strided-64-1step": Target(25, times=2),
    "maml-strided-64-5steps": Target(11, times=2),
}


def learner_gflop(row: dict) -> float:
    """Forward and backward arithmetic of one image, in GFLOP, without the input's."""
    size, channels = row["image"]
    filters = row.get("filters", 32)
    strided = row.get("downsample") == "stride"
    total, inputs = 0.0, channels
    for block in range(4):
        size = -(-size // 2) if strided else size
        layer = 2 * 9 * inputs * filters * size * size / 1e9
        total += layer * (2 if block == 0 else 3)
        size = size if strided else size // 2
        inputs = filters
    return total


def episode_gflop(row: dict, num_parameters: int) -> float:
    """Arithmetic of one meta-training episode, in GFLOP.

    A first-order step is a gradient; a second-order one is followed by the product of
    its Hessian with a vector, twice a gradient's work. Likewise a rule's step is a
    forward pass and its derivative.
    """
    images = row["steps"] * 5 * row["shot"] * (3 if row.get("second_order") else 1)
    total = (images + 75) * learner_gflop(row)
    if row.get("rule") not in ("sgd", "compare"):
        hidden = 20
        per_coordinate = 2 * 4 * hidden * (hidden + 2) + 2 * 2 * (hidden + 2)
        total += 3 * per_coordinate * num_parameters * row["steps"] / 1e9
    return total


def build(row: dict, num_classes: int = 20, per_class: int = 40) -> Recipe:
    """The recipe of a row, on random images."""
    import numpy as np

    from metalstm import adam_clipped, algorithms, first_order, nn, rules, second_order
    from metalstm.data import EpisodeSpec, make_pool

    size, channels = row["image"]
    images = np.random.default_rng(0).integers(
        0, 256, (num_classes, per_class, size, size, channels), dtype=np.uint8
    )
    filters, steps = row.get("filters", 32), row["steps"]
    differentiation = second_order() if row.get("second_order") else first_order()
    if row.get("rule") == "compare":
        learner = nn.conv4(None, filters, downsample=row.get("downsample", "max_pool"))
        algorithm = algorithms.prototypical(learner)
    else:
        learner = nn.conv4(
            5, filters, downsample=row.get("downsample", "max_pool"), momentum=0.1
        )
        if row.get("rule") == "sgd":
            algorithm = algorithms.maml(
                learner, 0.1, num_steps=steps, differentiation=differentiation
            )
        else:
            algorithm = algorithms.published_meta_lstm(
                learner,
                rules.lstm_gates(),
                num_steps=steps,
                differentiation=differentiation,
            )
    spec = EpisodeSpec(way=5, shot=row["shot"], queries=15)
    return Recipe(algorithm, adam_clipped(), spec, make_pool(images))


def measure(name: str, seconds: float) -> dict:
    """Time one row in this process."""
    import jax

    from metalstm.meta.evaluation import make_evaluate
    from metalstm.runtime.sharding import place

    row = ROWS[name]
    seeds = row.get("seeds", 1)
    mesh = rows.one_device_to_a_core(row["tasks"] * seeds)
    recipe = build(row)
    pool = place(recipe.data, mesh)
    train, state = rows.started(
        recipe,
        seeds=seeds,
        mesh=mesh,
        num_tasks=row["tasks"],
        steps_per_call=row.get("steps_per_call", 1),
    )
    state_now = [state]

    def step():
        state_now[0], metrics = train(state_now[0], pool)
        return metrics

    result = rows.timed(step, seconds)
    test = make_evaluate(recipe.algorithm, recipe.sampler, batch_size=1, mesh=mesh)
    params = state_now[0].params
    if seeds > 1:
        params = jax.tree.map(lambda leaf: leaf[0], params)
    num_parameters = sum(p.size for p in jax.tree.leaves(params.learner.params))
    test(params, pool, num_episodes=2)
    start = time.perf_counter()
    test(params, pool, num_episodes=6)
    rate = row["tasks"] * seeds * row.get("steps_per_call", 1) / result["seconds"]
    gflop = episode_gflop(row, num_parameters)
    return result | {
        "row": name,
        "rate": rate,
        "test_per_s": 6 / (time.perf_counter() - start),
        "share": rate * gflop / max(result["probe"]),
    }


if __name__ == "__main__":
    rows.run(__doc__, {"benchmarks.episodes": (ROWS, TARGETS)}, measure)
