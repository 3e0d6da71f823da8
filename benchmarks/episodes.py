"""Episodes per second of whole meta-steps, as a share of what the machine can do.

    python -m benchmarks.episodes            # every row
    python -m benchmarks.episodes mini-5shot # rows whose name contains the word

Each row runs in a process of its own (peak memory is the process's) and is timed
between two probes, a 2048-square float32 matrix product. "share" is the arithmetic of
the published recipe (counted below) per second over the probe's: a ratio that another
machine, or a noisier hour, should reproduce. Images are random: speed does not care.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

__all__ = ["main"]

ROWS = {
    "mini-1shot": {"image": (84, 3), "shot": 1, "steps": 12, "tasks": 1},
    "mini-5shot": {"image": (84, 3), "shot": 5, "steps": 8, "tasks": 1},
    "mini-5shot-second-order": {
        "image": (84, 3),
        "shot": 5,
        "steps": 8,
        "tasks": 1,
        "second_order": True,
    },
    "omniglot-lstm-first-order": {
        "image": (28, 1),
        "shot": 1,
        "steps": 3,
        "tasks": 4,
        "downsample": "stride",
    },
    "omniglot-lstm-second-order": {
        "image": (28, 1),
        "shot": 1,
        "steps": 3,
        "tasks": 4,
        "downsample": "stride",
        "second_order": True,
    },
    "maml-conv4-64-1step": {
        "image": (28, 1),
        "shot": 1,
        "steps": 1,
        "tasks": 4,
        "filters": 64,
        "rule": "sgd",
        "second_order": True,
    },
    "maml-conv4-64-5steps": {
        "image": (28, 1),
        "shot": 1,
        "steps": 5,
        "tasks": 4,
        "filters": 64,
        "rule": "sgd",
        "second_order": True,
    },
    "maml-strided-64-1step": {
        "image": (28, 1),
        "shot": 1,
        "steps": 1,
        "tasks": 4,
        "filters": 64,
        "rule": "sgd",
        "second_order": True,
        "downsample": "stride",
    },
}
# A public PyTorch implementation on a machine whose probe read 185 GFLOP/s: episodes
# (tasks) per second in meta-training and meta-testing.
PUBLISHED = {
    "mini-1shot": (1.03, 1.73),
    "mini-5shot": (0.70, 0.95),
    "maml-conv4-64-1step": (7.9, None),
    "maml-conv4-64-5steps": (4.9, None),
    "maml-strided-64-1step": (25.0, None),
}
PUBLISHED_PROBE = 185.0


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


def episode_gflop(row: dict, num_parameters: int) -> float | None:
    """Arithmetic of one first-order meta-training episode; None for second order."""
    if row.get("second_order"):
        return None
    images = row["steps"] * 5 * row["shot"] + 75
    hidden = 20
    per_coordinate = 2 * 4 * hidden * (hidden + 2) + 2 * 2 * (hidden + 2)
    rule = 3 * per_coordinate * num_parameters * row["steps"] / 1e9
    return images * learner_gflop(row) + rule


def probe() -> float:
    """GFLOP/s of a 2048-square float32 matrix product, the best of five."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048), jnp.float32) * 0.5
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def measure(name: str, seconds: float) -> dict:
    """Time one row in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metalstm import adam_clipped, algorithms, init_train_state, learners, rules
    from metalstm.data import ClassPool, EpisodeSpec
    from metalstm.evaluation import make_evaluate
    from metalstm.training import make_train_loop

    row = ROWS[name]
    size, channels = row["image"]
    images = np.random.default_rng(0).integers(
        0, 256, (20, 40, size, size, channels), dtype=np.uint8
    )
    pool = ClassPool(jnp.asarray(images), jnp.full(20, 40, jnp.int32))
    spec = EpisodeSpec(way=5, shot=row["shot"], queries=15)
    learner = learners.conv4(
        5,
        row.get("filters", 32),
        downsample=row.get("downsample", "max_pool"),
        momentum=0.1,
    )
    options = {
        "num_steps": row["steps"],
        "second_order": row.get("second_order", False),
    }
    if row.get("rule") == "sgd":
        algorithm = algorithms.maml(learner, 0.1, **options)
    else:
        algorithm = algorithms.meta_lstm(learner, rules.lstm_gates(), **options)
    optimizer = adam_clipped()
    episode = spec.sample(jax.random.key(0), pool)
    state = init_train_state(algorithm, optimizer, 0, episode)
    num_parameters = sum(p.size for p in jax.tree.leaves(state.params.learner.params))
    train = make_train_loop(algorithm, optimizer, spec, num_tasks=row["tasks"])
    before = probe()
    start = time.perf_counter()
    state, metrics = train(state, pool)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - start

    count, times = 0, []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or count < 3:
        step_start = time.perf_counter()
        state, metrics = train(state, pool)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - step_start)
        count += 1
    rate = row["tasks"] / float(np.median(times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    test = make_evaluate(algorithm, spec, batch_size=1)
    test(state.params, pool, num_episodes=2)
    start = time.perf_counter()
    test(state.params, pool, num_episodes=6)
    test_rate = 6 / (time.perf_counter() - start)
    after = probe()
    gflop = episode_gflop(row, num_parameters)
    return {
        "row": name,
        "train_per_s": rate,
        "test_per_s": test_rate,
        "compile_s": compile_seconds,
        "peak_gib": peak,
        "probe": [before, after],
        "share": None if gflop is None else rate * gflop / max(before, after),
        "parameters": num_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="rows containing this")
    parser.add_argument("--seconds", type=float, default=10, help="timed, per row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.seconds)))
        return
    print(
        f"{'row':28}{'train/s':>9}{'test/s':>9}{'share':>8}{'vs public':>11}"
        f"{'compile':>9}{'peak GiB':>10}{'probe GFLOP/s':>16}"
    )
    for name in ROWS:
        if arguments.only not in name:
            continue
        command = [sys.executable, "-m", "benchmarks.episodes", "--row", name]
        command += ["--seconds", str(arguments.seconds)]
        out = subprocess.run(
            command, capture_output=True, text=True, env=dict(os.environ), check=False
        )
        if out.returncode:
            print(f"{name:28} failed: {out.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(out.stdout.strip().splitlines()[-1])
        best_probe = max(r["probe"])
        share = "" if r["share"] is None else f"{100 * r['share']:.1f}%"
        public = ""
        if name in PUBLISHED:
            # rates per probe GFLOP/s, so that the two machines cancel
            ratio = r["train_per_s"] / best_probe
            ratio /= PUBLISHED[name][0] / PUBLISHED_PROBE
            public = f"{ratio:.2f}x"
        print(
            f"{name:28}{r['train_per_s']:9.2f}{r['test_per_s']:9.2f}{share:>8}"
            f"{public:>11}{r['compile_s']:8.1f}s{r['peak_gib']:10.2f}"
            f"{r['probe'][0]:9.0f}{r['probe'][1]:7.0f}"
        )


if __name__ == "__main__":
    main()
