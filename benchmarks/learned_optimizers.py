"""Meta-steps per second of learned optimizers, beside the machine's matrix product.

    python -m benchmarks.learned_optimizers             # every row
    python -m benchmarks.learned_optimizers quadratics  # rows whose name has the word

One meta-step is an unroll of 20 updates and its gradient. Each row runs in a process of
its own (peak memory is the process's) and is timed between two probes, a 2048-square
float32 matrix product; "vs public" is the rate per probe GFLOP/s over that of public
JAX implementations on a machine whose probe read 185 GFLOP/s, so that the machines
cancel. "share" is the arithmetic counted below, per second, over the probe's. Images
are random: speed does not care.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from benchmarks.episodes import probe

__all__ = ["main"]

UNROLL, HIDDEN, BATCH = 20, 20, 128
# 10-dimensional functions, 128 of them; 784-20-10, one task
ROWS = {
    "quadratics-tbptt": {"problem": "quadratics", "estimator": "backprop"},
    "quadratics-pes": {"problem": "quadratics", "estimator": "pes"},
    "mnist-mlp-tbptt": {"problem": "mlp", "estimator": "backprop"},
    "mnist-mlp-pes": {"problem": "mlp", "estimator": "pes"},
}
PUBLISHED = {
    "quadratics-tbptt": 8.6,
    "quadratics-pes": 13.0,
    "mnist-mlp-tbptt": 2.05,
    "mnist-mlp-pes": 3.5,
}
PUBLISHED_PROBE = 185.0


def gflop(row: dict) -> float:
    """Arithmetic of one meta-step, in GFLOP: two LSTM layers a coordinate, the problem.

    Truncated back-propagation takes three times the rule's forward pass, an antithetic
    pair two. The problem itself is small beside it: W theta twice a step, or the
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


def measure(name: str, seconds: float) -> dict:
    """Time one row in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metalstm import adam_clipped, algorithms, init_train_state, problems, rules
    from metalstm.data.labelled import ImageData
    from metalstm.training import make_train_loop

    row = ROWS[name]
    rng = np.random.default_rng(0)
    if row["problem"] == "mlp":
        family, tasks = problems.mlp_classifier(batch_size=BATCH), 1
        x = rng.integers(0, 256, (10_000, 28, 28, 1), dtype=np.uint8)
        y = rng.integers(0, 10, 10_000).astype(np.int32)
        data = ImageData(jnp.asarray(x), jnp.asarray(y))
    else:
        family, tasks, data = problems.quadratics(10), 128, ()
    algorithm = algorithms.learned_optimizer(
        family,
        rules.l2l(hidden_size=HIDDEN, num_layers=2),
        num_tasks=tasks,
        unroll_steps=UNROLL,
        horizon=5 * UNROLL,
        estimator=row["estimator"],
    )
    sampler = problems.ProblemSampler(family, UNROLL + 1)
    optimizer = adam_clipped(1e-3, 1.0)
    draw = sampler.sample(jax.random.key(0), data)
    state = init_train_state(algorithm, optimizer, 0, draw)
    train = make_train_loop(algorithm, optimizer, sampler, num_tasks=tasks)
    before = probe()
    begun = time.perf_counter()
    state, metrics = train(state, data)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - begun
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 3:
        step_begun = time.perf_counter()
        state, metrics = train(state, data)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - step_begun)
    after = probe()
    rate = 1 / float(np.median(times))
    return {
        "row": name,
        "rate": rate,
        "compile_s": compile_seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "probe": [before, after],
        "share": rate * gflop(row) / max(before, after),
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
        f"{'row':20}{'meta-steps/s':>13}{'share':>8}{'vs public':>11}{'compile':>9}"
        f"{'peak GiB':>10}{'probe GFLOP/s':>16}"
    )
    for name in ROWS:
        if arguments.only not in name:
            continue
        command = [sys.executable, "-m", "benchmarks.learned_optimizers", "--row", name]
        command += ["--seconds", str(arguments.seconds)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            print(f"{name:20} failed: {out.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(out.stdout.strip().splitlines()[-1])
        # rates per probe GFLOP/s, so that the two machines cancel
        ratio = r["rate"] / max(r["probe"]) / (PUBLISHED[name] / PUBLISHED_PROBE)
        print(
            f"{name:20}{r['rate']:13.2f}{100 * r['share']:7.1f}%{ratio:10.2f}x"
            f"{r['compile_s']:8.1f}s{r['peak_gib']:10.2f}"
            f"{r['probe'][0]:9.0f}{r['probe'][1]:7.0f}"
        )


if __name__ == "__main__":
    main()
