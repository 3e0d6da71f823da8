"""Memory and time of second-order unrolls, for each choice of what is kept.

    python -m benchmarks.memory                       # every row
    python -m benchmarks.memory --quick               # learned rates, 10 and 100 steps
    python -m benchmarks.memory --problems l2l --steps 100

The first two problems are L2L's MNIST network (784-20-10, sigmoid, minibatches of 128;
the images are random, which changes neither memory nor speed). The gradient is that of
the mean of the T losses, by the parameters of the rule that trains it: a learned rate
for every coordinate, or L2L's LSTM. "truncated" adds up the gradients of windows of 10
steps, which is another gradient. The third is one task of MAML (T steps on 5 images,
the loss of 75), conv4 with 32 filters on 28x28.

"stored" is the memory that XLA allocates for the compiled program, without arguments
and results. Each problem and length has a process of its own, in which the choices are
interleaved, so that "of all" holds on a machine whose speed varies. "resident" is how
far a fresh process, which loads the compiled program, grows at most in running it
(Linux only). A program that would store more than --limit GiB is compiled and not run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]

CHOICES = ("all", "remat", "mixed", "segments")
TRUNCATED, WINDOW = "truncated", 10
STEPS = {"rates": (10, 30, 100, 300), "l2l": (100,), "maml": (5,)}
QUICK = {"rates": (10, 100)}
BATCH = 128
MIB = 2**20


def mlp_gradients(rule_name: str, steps: int) -> tuple[dict[str, Callable], tuple]:
    """For each choice (rule's parameters, theta_0, images) -> gradient; arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from metalstm import rules
    from metalstm.data.sources.labelled import ImageData
    from metalstm.inner import second_order, unroll
    from metalstm.learned_optimizers import problems

    rng = np.random.default_rng(0)
    data = ImageData(
        jnp.asarray(rng.integers(0, 256, (1_000, 28, 28, 1), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 10, 1_000), jnp.int32),
    )
    family = problems.mlp_classifier(batch_size=BATCH)
    sampler = problems.ProblemSampler(family, steps)
    draw = jax.jit(sampler.sample)(jax.random.key(0), data)
    rule = {"rates": rules.learned_sgd(0.1, per="parameter"), "l2l": rules.l2l()}[
        rule_name
    ]
    weights = rule.init(jax.random.key(1), draw.params)

    def window(weights, theta, rule_state, batches, keep):
        def objective(weights):
            final, trace = unroll(
                lambda params, stats, batch, key: (
                    family.loss(params, draw.task, batch),
                    stats,
                ),
                rule,
                weights,
                theta,
                batches,
                num_steps=len(jax.tree.leaves(batches)[0]),
                differentiation=second_order(keep),
                rule_state=rule_state,
            )
            return trace.losses.sum() / steps, final

        return jax.grad(objective, has_aux=True)(weights)

    def whole(keep):
        def gradient(weights, theta, batches):
            return window(weights, theta, None, batches, keep)[0]

        return gradient

    def truncated(weights, theta, batches):
        def one(carry, batches):
            total, theta, state = carry
            grads, end = window(weights, theta, state, batches, "all")
            total = jax.tree.map(jnp.add, total, grads)
            return (total, end.params, end.rule_state), None

        zeros = jax.tree.map(jnp.zeros_like, weights)
        start = (zeros, theta, rule.bind(weights).init(theta))
        windows = jax.tree.map(lambda x: x.reshape(-1, WINDOW, *x.shape[1:]), batches)
        return lax.scan(one, start, windows)[0][0]

    gradients = {choice: whole(choice) for choice in CHOICES} | {TRUNCATED: truncated}
    return gradients, (weights, draw.params, draw.batches)


def maml_gradients(steps: int) -> tuple[dict[str, Callable], tuple]:
    """For each choice (theta_0, episode) -> gradient by theta_0; arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from metalstm import algorithms, nn
    from metalstm.base import Batch, Episode
    from metalstm.inner import second_order

    rng = np.random.default_rng(0)

    def images(number):
        x = jnp.asarray(rng.random((number, 28, 28, 1)), jnp.float32)
        return Batch(x, jnp.arange(number) % 5)

    episode = Episode(images(5), images(75))
    key = jax.random.key(0)

    def choose(keep):
        algorithm = algorithms.maml(
            nn.conv4(5, 32), 0.1, num_steps=steps, differentiation=second_order(keep)
        )

        def gradient(meta_params, episode):
            loss = lambda p: algorithm.loss(p, key, episode)[0]  # noqa: E731
            return jax.grad(loss)(meta_params).learner.params

        return gradient, algorithm

    start = choose("all")[1].init(key, episode)
    return {choice: choose(choice)[0] for choice in CHOICES}, (start, episode)


def build(problem: str, steps: int) -> tuple[dict[str, Callable], tuple]:
    return maml_gradients(steps) if problem == "maml" else mlp_gradients(problem, steps)


def measure(problem: str, steps: int, rounds: int, limit: float) -> list[dict]:
    """Compile all choices for one problem and length, and interleave them."""
    import jax
    import numpy as np
    from jax.flatten_util import ravel_pytree

    gradients, args = build(problem, steps)
    rows: dict[str, dict] = {}
    programs: dict[str, Any] = {}
    for name, gradient in gradients.items():
        begun = time.perf_counter()
        program = jax.jit(gradient).lower(*args).compile()
        stored = program.memory_analysis().temp_size_in_bytes
        rows[name] = {
            "problem": problem,
            "steps": steps,
            "choice": name,
            "stored_mib": stored / MIB,
            "compile_s": time.perf_counter() - begun,
        }
        if stored <= limit * 2**30:
            programs[name] = program
    times: dict[str, list[float]] = {name: [] for name in programs}
    results: dict[str, np.ndarray] = {}
    for name, program in programs.items():
        results[name] = np.asarray(ravel_pytree(program(*args))[0])
    for _ in range(rounds):
        for name, program in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        rows[name]["seconds"] = float(np.median(seconds))
        if "all" in results:
            everything = results["all"]
            off = np.abs(results[name] - everything).max() / np.abs(everything).max()
            rows[name]["off"] = float(off)
    return list(rows.values())


def growth(problem: str, steps: int, choice: str) -> float | None:
    """MiB by which this process's resident memory grows at most in one run."""
    import jax

    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    gradients, args = build(problem, steps)
    program = jax.jit(gradients[choice]).lower(*args).compile()
    jax.block_until_ready(program(*args))  # the first call starts threads
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    peak.write_text("5")  # forget the highest so far
    before = resident("VmRSS")
    jax.block_until_ready(program(*args))
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """KiB, a line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def show(rows: list[dict]) -> None:
    plain = rows[0]
    print(f"{plain['problem']}, {plain['steps']} steps")
    for row in rows:
        share = row["stored_mib"] / plain["stored_mib"]
        line = f"  {row['choice']:12}{row['stored_mib']:10.1f}{share:10.3f}"
        grown = row.get("resident_mib")
        line += f"{grown:11.1f}" if grown is not None else f"{'-':>11}"
        if "seconds" in row:
            line += f"{1e3 * row['seconds']:10.0f}"
            known = "seconds" in plain
            ratio = row["seconds"] / plain["seconds"] if known else None
            line += f"{ratio:10.2f}" if known else f"{'-':>10}"
        else:
            line += f"{'not run':>20}"
        line += f"{row['off']:10.0e}" if "off" in row else f"{'-':>10}"
        print(f"{line}{row['compile_s']:9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--steps", nargs="+", type=int, help="T, of every problem")
    parser.add_argument("--quick", action="store_true", help="two rows, a minute")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB a run may store")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        problem, steps, *choice = arguments.row
        if choice:
            print(json.dumps(growth(problem, int(steps), *choice)))
        else:
            rounds, limit = arguments.rounds, arguments.limit
            print(json.dumps(measure(problem, int(steps), rounds, limit)))
        return
    for steps in arguments.steps or ():
        if steps < 1 or (steps % WINDOW and set(arguments.problems) != {"maml"}):
            parser.error(f"--steps {steps}: give a multiple of {WINDOW}, the window")
    print(
        f"{'memory':14}{'stored MiB':>10}{'of all':>10}{'resident':>11}{'ms':>10}"
        f"{'of all':>10}{'off by':>10}{'compile':>9}"
    )
    wanted = QUICK if arguments.quick else STEPS
    options = ["--rounds", str(arguments.rounds), "--limit", str(arguments.limit)]
    with tempfile.TemporaryDirectory() as programs:
        for problem, lengths in wanted.items():
            if problem not in arguments.problems:
                continue
            for steps in arguments.steps or lengths:
                rows = run(programs, [problem, str(steps)], options)
                for row in rows:
                    if "seconds" in row:
                        name = [problem, str(steps), row["choice"]]
                        row["resident_mib"] = run(programs, name, options)
                show(rows)


def run(programs: str, row: list[str], options: list[str]) -> Any:
    """What a process of its own prints; compiled programs are kept in a folder."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "benchmarks.memory", "--row", *row, *options]
    out = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    if out.returncode:
        reason = out.stderr.strip().splitlines()[-1:] or [f"exit {out.returncode}"]
        raise SystemExit(f"error: {' '.join(row)}: {reason[0]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
