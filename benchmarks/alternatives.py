"""Two ways to do the same thing, interleaved in one process: what the defaults rest on.

    python -m benchmarks.alternatives

- Back-propagation through the rule: replayed in blocks of coordinates, or plain
  (the published rule, 32,901 coordinates, 8 updates, first order).
- Tasks of a meta-batch: one after another in a scan, all at once by vmap, or unrolled
  in the program (second-order MAML, Conv4 on 28x28, 4 tasks).

Ratios, since machines differ: each row's time over that of the first row of its table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalstm import adam_clipped, algorithms, nn, rules
from metalstm.data import EpisodeSpec, make_pool
from metalstm.inner import first_order, unroll
from metalstm.meta.step import init_train_state, make_train_step

__all__ = ["main"]


def in_turn(fns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, A B A B ..., after one call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        jax.block_until_ready(fn())
    for _ in range(rounds):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def table(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {name:28}{1e3 * value:9.1f} ms{value / first:8.2f}x")


def through_the_rule(coordinates: int = 32_901, updates: int = 8) -> dict:
    """The derivative of theta_T by the rule's parameters and theta_0."""
    rule = rules.lstm_gates()
    theta = {"w": jax.random.normal(jax.random.key(0), (coordinates,)) * 0.05}
    grads = jax.random.normal(jax.random.key(1), (updates, coordinates)) * 1e-3
    direction = jax.random.normal(jax.random.key(2), (coordinates,))
    rule_params = rule.init(jax.random.key(3), theta)

    def loss_fn(params, stats, batch, key):
        del key
        return jnp.vdot(batch, params["w"]) + 1.6, stats

    def objective(rule_params, theta, blocked: bool):
        traits = rule.traits._replace(coordinatewise=blocked)
        final, _ = unroll(
            loss_fn,
            rule._replace(traits=traits),
            rule_params,
            theta,
            grads,
            num_steps=updates,
            differentiation=first_order(),
        )
        return jnp.vdot(final.params["w"], direction)

    def run(blocked: bool):
        fn = jax.jit(jax.grad(lambda r, t: objective(r, t, blocked), argnums=(0, 1)))
        return lambda: fn(rule_params, theta)

    return {"blocks of coordinates": run(True), "plain": run(False)}


def over_tasks(filters: int, steps: int) -> dict:
    """One meta-step of second-order MAML in each mapping."""
    images = np.random.default_rng(0).integers(0, 256, (20, 20, 28, 28, 1), np.uint8)
    pool = make_pool(images)
    spec = EpisodeSpec(way=5, shot=1, queries=15)
    keys = jax.random.split(jax.random.key(0), 4)
    episodes = jax.vmap(lambda key: spec.sample(key, pool))(keys)
    one = jax.tree.map(lambda leaf: leaf[0], episodes)
    fns = {}
    for how in ("scan", "vmap", "unroll"):
        algorithm = algorithms.maml(
            nn.conv4(5, filters), 0.1, num_steps=steps, task_mapping=how
        )
        optimizer = adam_clipped()
        step = make_train_step(algorithm, optimizer)
        state = init_train_state(algorithm, optimizer, 0, one)

        def run(step=step, start=state):
            # a step donates its state
            return step(jax.tree.map(jnp.copy, start), episodes)[1]

        fns[how] = run
    return fns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--filters", type=int, default=64, help="of the MAML learner")
    parser.add_argument("--steps", type=int, default=1, help="inner updates of MAML")
    arguments = parser.parse_args()
    table(
        "gradient through the rule (32,901 coordinates, 8 updates)",
        in_turn(through_the_rule(), arguments.rounds),
    )
    table(
        f"second-order MAML, 4 tasks, conv4-{arguments.filters}, "
        f"{arguments.steps} inner step(s)",
        in_turn(over_tasks(arguments.filters, arguments.steps), arguments.rounds),
    )


if __name__ == "__main__":
    main()
