"""Networks that users bring, as `from_flax` computes them and as flax does.

Claim: a flax module in an inner loop on a CPU takes at most 1.2 times as long as the
built-in network that computes the same, whatever its convolutions; as flax computes it,
up to tens of times.

    taskset -c 0 python -m benchmarks.own_network [--quick] [--only NAME ...]

For every network the milliseconds of a forward pass, of a first-order and of a
second-order meta-step of MAML (3 updates, 2 tasks of 5 classes, one image each, 3
queries) in `from_flax`'s form, with the ratio of flax's own form to it; and where the
library has the same network, the ratio of the user's to the built-in one. Times are of
the process's CPU, medians of calls that take turns, so that a busy machine changes
them less; pin the process to one core.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import metalstm
from metalstm import algorithms, data
from metalstm.nn import conv4, from_flax
from metalstm.runtime.compilation import Jitted

WAY = 5
KINDS = ("forward", "first order", "second order")


class LinenNet(nn.Module):
    """Blocks of convolutions, batch norm, ReLU and, where ``pool``, a 2x2 max-pool."""

    convs: tuple[dict, ...]  # of a block, arguments of nn.Conv
    blocks: int = 2
    pool: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(self.blocks):
            for options in self.convs:
                x = nn.Conv(**options)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            window = (2,) * (x.ndim - 2)
            x = nn.max_pool(x, window, window) if self.pool else x
        return nn.Dense(WAY)(x.reshape(x.shape[0], -1))


class NNXNet(nnx.Module):
    """The same; ``size`` is how many pixels the last maps have."""

    def __init__(self, conv: dict, channels: int, size: int, blocks: int = 2, *, rngs):
        width = conv["out_features"]
        inputs = [channels] + [width] * (blocks - 1)
        self.convs = nnx.List(nnx.Conv(n, rngs=rngs, **conv) for n in inputs)
        self.norms = nnx.List(nnx.BatchNorm(width, rngs=rngs) for _ in inputs)
        self.head = nnx.Linear(size * width, WAY, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            window = (2,) * (x.ndim - 2)
            x = nnx.max_pool(nnx.relu(norm(conv(x))), window, window)
        return self.head(x.reshape(x.shape[0], -1))


class Network(NamedTuple):
    make: Callable[[int, int], Any]  # (filters, pixels) -> what from_flax takes
    channels: int = 3
    ndim: int = 2
    built_in: Callable[[int], metalstm.Learner] | None = None


def _linen(*convs: dict, **options: Any) -> Callable[[int, int], Any]:
    def make(filters: int, pixels: int) -> LinenNet:
        del pixels
        filled = ({"features": filters} | conv for conv in convs)
        return LinenNet(tuple(filled), **options)

    return make


def _nnx(shrink: Callable[[int], int], channels: int = 3, ndim: int = 2, **conv: Any):
    def make(filters: int, pixels: int) -> Callable:
        options = {"out_features": filters} | conv
        size = shrink(shrink(pixels)) ** ndim
        return functools.partial(NNXNet, options, channels, size)

    return make


def _separable(filters: int, pixels: int) -> LinenNet:
    del pixels
    return LinenNet(
        (
            {"features": filters, "kernel_size": (1, 1)},
            {
                "features": filters,
                "kernel_size": (3, 3),
                "feature_group_count": filters,
            },
        )
    )


SAME: dict[str, Any] = {"kernel_size": (3, 3)}
NETWORKS = {
    "3x3, max-pool (NNX)": Network(
        _nnx(lambda n: n // 2, **SAME),
        built_in=lambda filters: conv4(WAY, filters, num_blocks=2),
    ),
    "3x3, max-pool (Linen)": Network(
        _linen(SAME), built_in=lambda filters: conv4(WAY, filters, num_blocks=2)
    ),
    "3x3, strides of 2 (Linen)": Network(
        _linen(SAME | {"strides": 2}, pool=False),
        built_in=lambda filters: conv4(WAY, filters, num_blocks=2, downsample="stride"),
    ),
    "5x5, VALID (NNX)": Network(
        _nnx(lambda n: (n - 4) // 2, kernel_size=(5, 5), padding="VALID")
    ),
    "3x3, dilation of 2 (Linen)": Network(_linen(SAME | {"kernel_dilation": 2})),
    "3x3, 4 groups (NNX)": Network(
        _nnx(lambda n: n // 2, channels=4, feature_group_count=4, **SAME), channels=4
    ),
    "1x1, depthwise 3x3 (Linen)": Network(_separable),
    "1-D, width 5 (NNX)": Network(
        _nnx(lambda n: n // 2, ndim=1, kernel_size=(5,)), ndim=1
    ),
}


def programs(learner: metalstm.Learner, pool: Any) -> dict[str, Callable[[], Any]]:
    """A call of each kind, compiled."""
    spec = data.EpisodeSpec(way=WAY, shot=1, queries=3)
    episode = spec.sample(data.episode_key(0, "train", 0), pool)
    calls: dict[str, Callable[[], Any]] = {}
    state = learner.init(jax.random.key(0), episode.query.x)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    x = jnp.stack([episode.query.x] * 2)
    forward = Jitted(jax.vmap(lambda s, x: learner.apply(s, x, norm="batch")[0]))
    calls["forward"] = functools.partial(forward, states, x)
    for kind, method in zip(
        KINDS[1:], (algorithms.fomaml, algorithms.maml), strict=True
    ):
        algorithm, optimizer = method(learner, 0.1, num_steps=3), optax.sgd(0.1)
        train_state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
        train = metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=2)

        def step(train=train, start=train_state):
            # the state is donated
            return train(jax.tree.map(jnp.copy, start), pool)[1]

        calls[kind] = step
    for call in calls.values():
        jax.block_until_ready(call())
    return calls


def milliseconds(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median CPU time of each, the calls taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            started = time.process_time()
            jax.block_until_ready(call())
            found.append(time.process_time() - started)
    return [1e3 * float(np.median(found)) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, as a test")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pixels, filters = (16, 4) if args.quick else (24, 32)
    print(f"{jax.default_backend()}, {pixels} pixels, {filters} filters")
    print("| network | " + " | ".join(f"{k}, ms | flax's own" for k in KINDS), end="")
    print(" | of the built-in |\n|---|" + "---:|" * 7)
    for name in args.only:
        network = NETWORKS[name]
        length = pixels if network.ndim == 2 else pixels * 8
        shape = (20, 4, *(length,) * network.ndim, network.channels)
        rng = np.random.default_rng(0)
        pool = data.make_pool(rng.random(shape, np.float32))
        module = network.make(filters, length)
        forms = [from_flax(module), from_flax(module, layers="flax")]
        if network.built_in is not None:
            forms.append(network.built_in(filters))
        of_forms = [programs(form, pool) for form in forms]
        cells, ratios = [], []
        for kind in KINDS:
            rounds = args.rounds * (10 if kind == "forward" else 1)
            ours, flax_s, *built_in = milliseconds([c[kind] for c in of_forms], rounds)
            cells += [f"{ours:.3g}", f"{flax_s / ours:.1f}x"]
            ratios += [f"{ours / other:.2f}x" for other in built_in]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
