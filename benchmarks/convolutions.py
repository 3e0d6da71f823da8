"""The forms of convolution and max-pool against each other, inside a loop.

Claim: on a CPU the kernel's derivative as matrix products of a few images beats that of
`lax.conv` in a loop many times over (the convolution itself is `lax.conv`'s in both),
most with a kernel per task; with an elementwise max-pool, a whole Conv4 runs forward
and backward at over a third of the speed of a large matrix product.

    python -m benchmarks.convolutions [--quick] [--seconds 0.5]

Every figure is the share of the probe (a 2048-square float32 matrix product measured
in the same run) that the useful arithmetic reached, forward / forward and backward.
Time is the best of many calls, so that other programs on the machine disturb it less.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from metalstm.nn.convolution import conv2d, default_method
from metalstm.nn.pooling import max_pool
from metalstm.runtime.compilation import Jitted

METHODS = ("xla", "slices", "blocked")
REPEATS = 3  # iterations of the loop around a layer, as an inner loop has them

# (tasks, images a task, pixels, input channels, output channels)
LAYERS = [
    (1, 25, 84, 3, 32),  # mini-ImageNet, 5-way 5-shot
    (1, 25, 42, 32, 32),
    (1, 25, 21, 32, 32),
    (1, 25, 10, 32, 32),
    (1, 5, 42, 32, 32),  # 1-shot
    (1, 75, 21, 32, 32),  # queries
    (4, 5, 28, 1, 64),  # Omniglot, 4 tasks with a kernel each
    (4, 5, 14, 64, 64),
    (4, 75, 14, 64, 64),
]
QUICK = [(1, 5, 10, 32, 32), (4, 5, 7, 16, 16)]


def measure(fn, *args, seconds: float) -> float:
    """Best seconds of a call of the jitted ``fn`` within the time given."""
    jax.block_until_ready(fn(*args))
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def probe(seconds: float) -> float:
    """GFLOP/s of a 2048-square float32 matrix product."""
    matrix = jnp.ones((2048, 2048), jnp.float32)
    return (
        2
        * 2048**3
        / measure(jax.jit(jnp.matmul), matrix, matrix, seconds=seconds)
        / 1e9
    )


def loop(step):
    """(kernels, xs [REPEATS, ...]) -> kernels after ``step`` on each of the xs.

    Images are arguments and new in every iteration: nothing can be hoisted or folded.
    """
    return Jitted(
        lambda kernels, xs: lax.scan(lambda k, x: (step(k, x), None), kernels, xs)[0]
    )


def layer(shape, method: str, seconds: float) -> tuple[float, float]:
    """GFLOP/s forward, forward and backward. A first layer's images get no gradient."""
    tasks, images, pixels, channels, filters = shape
    keys = jax.random.split(jax.random.key(0))
    xs = jax.random.normal(keys[0], (REPEATS, tasks, images, pixels, pixels, channels))
    kernels = jax.random.normal(keys[1], (tasks, 3, 3, channels, filters)) * 0.1
    inner = channels > 3
    conv = jax.vmap(functools.partial(conv2d, method=method))

    def backward(kernels, x):
        y, transpose = jax.vjp(conv, x, kernels)
        to_x, to_kernels = transpose(y)
        return kernels + 1e-9 * (to_kernels + (to_x.ravel()[0] if inner else 0))

    def forward(kernels, x):
        return kernels * (1 + 1e-9 * conv(x, kernels).ravel()[0])

    work = 18 * tasks * images * pixels**2 * channels * filters * REPEATS / 1e9
    return (
        work / measure(loop(forward), kernels, xs, seconds=seconds),
        (3 if inner else 2)
        * work
        / measure(loop(backward), kernels, xs, seconds=seconds),
    )


def chain(shape, method: str, pool: str, seconds: float) -> tuple[float, float]:
    """GFLOP/s of four blocks of convolution, batch norm, pool and ReLU, in a loop."""
    images, pixels, channels, filters = shape
    keys = jax.random.split(jax.random.key(0), 5)
    xs = jax.random.normal(keys[0], (REPEATS, images, pixels, pixels, channels))
    sizes = [channels, *[filters] * 4]
    kernels = [
        jax.random.normal(key, (3, 3, *pair)) * (9 * pair[0]) ** -0.5
        for key, pair in zip(keys[1:], itertools.pairwise(sizes), strict=True)
    ]

    def normalise(x):
        mean = x.mean((0, 1, 2))
        scale = lax.rsqrt((x * x).mean((0, 1, 2)) - mean * mean + 1e-3)
        return scale, -mean * scale

    def loss(kernels, x):
        out = x
        for kernel in kernels:
            out = conv2d(out, kernel, method=method)
            scale, shift = normalise(out)
            if pool == "first":
                out = max_pool(out) * scale + shift
            else:
                out = nn.max_pool(out * scale + shift, (2, 2), (2, 2))
            out = jax.nn.relu(out)
        return jnp.sin(out).sum()

    def forward(kernels, x):
        return jax.tree.map(lambda k: k * (1 + 1e-9 * loss(kernels, x)), kernels)

    def backward(kernels, x):
        gradient = jax.grad(loss)(kernels, x)
        return jax.tree.map(lambda k, g: k - 1e-9 * g, kernels, gradient)

    work = [
        18 * images * (pixels // 2**i) ** 2 * a * b * REPEATS / 1e9
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    both = 3 * sum(work) - work[0]
    return (
        sum(work) / measure(loop(forward), kernels, xs, seconds=seconds),
        both / measure(loop(backward), kernels, xs, seconds=seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, as a test")
    parser.add_argument("--seconds", type=float, default=0.5, help="a measurement")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--only", choices=("layers", "chain"))
    args = parser.parse_args()
    speed = probe(args.seconds)
    print(f"{jax.default_backend()}, probe {speed:.0f} GFLOP/s")
    print(f"default for 3x3, stride 1: {default_method((3, 3, 32, 32))}")

    def show(name, measured):
        cells = "".join(
            f"{label:>9} {100 * f / speed:4.0f} / {100 * b / speed:3.0f} %"
            for label, (f, b) in measured
        )
        print(f"{name:<26}{cells}", flush=True)

    if args.only != "chain":
        print("share of the probe, forward / forward and backward")
        for shape in QUICK if args.quick else LAYERS:
            tasks, images, pixels, channels, filters = shape
            name = f"{tasks} x {images} x {pixels}px {channels}->{filters}"
            show(name, [(m, layer(shape, m, args.seconds)) for m in args.methods])
    if args.only != "layers":
        print("four blocks; pool: flax's after the norm, or ours before it")
        for shape in (
            [(5, 16, 3, 8)] if args.quick else [(25, 84, 3, 32), (5, 84, 3, 32)]
        ):
            for pool in ("last", "first"):
                name = f"{shape[0]} x {shape[1]}px, pool {pool}"
                pairs = [(m, chain(shape, m, pool, args.seconds)) for m in args.methods]
                show(name, pairs)
    again = probe(args.seconds)
    print(f"probe {again:.0f} GFLOP/s at the end")
    if abs(again - speed) > 0.15 * speed:
        print("the probes differ by more than 15%: the machine was busy, run it again")


if __name__ == "__main__":
    main()
