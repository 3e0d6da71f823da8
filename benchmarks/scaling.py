"""Step time against hosts: a model from measured parts. No cluster is needed.

    python -m benchmarks.scaling              # every recipe
    python -m benchmarks.scaling prototypical # those whose name contains the word
    python -m benchmarks.scaling meta-lstm --task-ms 787   # timed elsewhere

Measured on this machine: the processor time of a meta-step of one task, sampling and
optimizer included. (It is core-seconds, which other programs on the machine hardly
lengthen.) Counted: the P numbers of the meta-gradient, which alone travel. The model of
a meta-step in which each of n hosts computes k tasks:

    step(n) = k * task + ring(n)
    ring(n) = 2 (n - 1) / n * 4 P / bandwidth + 2 (n - 1) * latency     [1 host: 0]

It is for all-reduces that no computation hides and for hosts of equal speed. Bandwidths
and latencies are ASSUMPTIONS (`LINKS`), not measurements; the tables say which.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

__all__ = ["LINKS", "Link", "Parts", "main", "ring_seconds", "step_seconds"]

HOSTS = (1, 2, 4, 8, 16, 32, 64)
RECIPES = {
    "meta-lstm, mini-ImageNet 5-shot": {"shot": 5, "steps": 8},
    "maml, mini-ImageNet 1-shot": {"shot": 1, "steps": 5},
    "prototypical, mini-ImageNet 5-shot": {"shot": 5, "steps": 0},
}


class Link(NamedTuple):
    """Between neighbours of a ring of hosts."""

    bandwidth: float  # bytes a second, each way
    latency: float  # seconds of one hop


LINKS = {
    "10 Gbit/s Ethernet": Link(1.25e9, 50e-6),
    "100 Gbit/s Ethernet": Link(12.5e9, 20e-6),
    "400 Gbit/s InfiniBand": Link(50e9, 5e-6),
}


class Parts(NamedTuple):
    """What was measured and counted of one recipe."""

    task: float  # seconds a task
    num_parameters: int  # P, of the meta-gradient


def ring_seconds(num_parameters: int, hosts: int, link: Link) -> float:
    """The time of summing P float32 numbers around a ring.

    Each host sends, and hears, 2 (n - 1) / n of the array in 2 (n - 1) messages.
    """
    share = 2 * (hosts - 1) / hosts
    return share * 4 * num_parameters / link.bandwidth + 2 * (hosts - 1) * link.latency


def step_seconds(parts: Parts, hosts: int, tasks: int, link: Link) -> float:
    """The model: ``tasks`` on each of ``hosts``, and one all-reduce."""
    communication = ring_seconds(parts.num_parameters, hosts, link)
    return tasks * parts.task + communication


def tasks_for(parts: Parts, hosts: int, link: Link, share: float = 0.1) -> int:
    """The fewest tasks a host with which the all-reduce takes ``share`` of a step."""
    communication = ring_seconds(parts.num_parameters, hosts, link)
    needed = communication * (1 - share) / share
    return max(1, -int(-needed // parts.task))


def build(name: str) -> tuple[Any, Any, Any]:
    """The recipe's algorithm, its episodes, and random images to draw them from."""
    import numpy as np

    from metalstm import algorithms, nn, rules
    from metalstm.data import EpisodeSpec, make_pool

    recipe = RECIPES[name]
    updates = recipe["steps"]
    learner = nn.conv4(5, 32, momentum=0.1)
    if name.startswith("meta-lstm"):
        algorithm = algorithms.published_meta_lstm(
            learner, rules.lstm_gates(), num_steps=updates
        )
    elif name.startswith("maml"):
        algorithm = algorithms.maml(learner, 0.01, num_steps=updates)
    else:
        algorithm = algorithms.prototypical(nn.conv4(None, 32))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 40, 84, 84, 3), dtype=np.uint8)
    pool = make_pool(images)
    return algorithm, EpisodeSpec(way=5, shot=recipe["shot"], queries=15), pool


def count_parameters(name: str) -> int:
    """P: the numbers of the meta-gradient, nothing computed."""
    import jax

    algorithm, spec, pool = build(name)

    def gradient(key: Any) -> Any:
        episode = spec.sample(key, pool)
        params = algorithm.init(key, episode)
        carry = algorithm.init_carry(key, params, episode)
        tasks = jax.tree.map(lambda leaf: leaf[None], (key, episode))
        return algorithm.meta_gradient(params, carry, *tasks)[0]

    leaves = jax.tree.leaves(jax.eval_shape(gradient, jax.random.key(0)))
    return sum(leaf.size for leaf in leaves)


def measure_task(name: str, steps: int) -> float:
    """The core-seconds of a step of one task, the mean of ``steps``."""
    import jax

    from metalstm import adam_clipped, init_train_state
    from metalstm.meta.step import make_train_loop

    algorithm, spec, pool = build(name)
    optimizer = adam_clipped()
    episode = spec.sample(jax.random.key(0), pool)
    state = init_train_state(algorithm, optimizer, 0, episode)
    step = make_train_loop(algorithm, optimizer, spec, num_tasks=1)
    state, metrics = step(state, pool)
    jax.block_until_ready(metrics)
    # over all steps: a single one may end before its threads' time is counted
    begun = time.process_time()
    for _ in range(steps):
        state, metrics = step(state, pool)
        jax.block_until_ready(metrics)
    return (time.process_time() - begun) / steps


def print_model(name: str, parts: Parts, faster: float) -> None:
    parts = parts._replace(task=parts.task / faster)
    megabytes = 4 * parts.num_parameters / 1e6
    said = f", {faster:g} times as fast" if faster != 1 else ""
    print(
        f"\n{name}: {1e3 * parts.task:.3g} ms a task{said}; P = "
        f"{parts.num_parameters:,} ({megabytes:.3g} MB)"
    )
    print(f"  {'one task a host; hosts:':30}" + "".join(f"{n:>9}" for n in HOSTS))
    for label, link in LINKS.items():
        one = step_seconds(parts, 1, 1, link)
        times = [step_seconds(parts, n, 1, link) for n in HOSTS]
        cells = "".join(f"{1e3 * t:9.4g}" for t in times)
        print(f"  {'ms a step, ' + label:30}{cells}")
        cells = "".join(f"{one / t:>9.0%}" for t in times)
        print(f"  {'of linear':30}{cells}")
        cells = "".join(f"{tasks_for(parts, n, link):>9}" for n in HOSTS)
        print(f"  {'tasks a host for 90%':30}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="recipes containing this")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each recipe")
    parser.add_argument(
        "--faster",
        type=float,
        default=1000,
        help="show the model also for devices so many times as fast",
    )
    parser.add_argument(
        "--task-ms", type=float, help="milliseconds a task, where that is known already"
    )
    arguments = parser.parse_args()
    print("assumed links, each way and each hop:")
    for label, link in LINKS.items():
        print(f"  {label}: {link.bandwidth / 1e9:g} GB/s, {1e6 * link.latency:g} us")
    for name in (name for name in RECIPES if arguments.only in name):
        task = (arguments.task_ms or 0) / 1e3 or measure_task(name, arguments.steps)
        parts = Parts(task, count_parameters(name))
        for faster in dict.fromkeys((1.0, arguments.faster)):
            print_model(name, parts, faster)


if __name__ == "__main__":
    main()
