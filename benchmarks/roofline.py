"""The machine's limits for the shapes in use, and what recipes could reach under them.

    python -m benchmarks.roofline [--markdown] [--seconds 0.3]

Measured in one run: the probe (a 2048-square float32 matrix product); each layer's
convolution and the products that its derivatives are, at their own shapes, in a loop as
the inner loop has them; the rule's products; elementwise passes; tanh; normal numbers
(PES draws a perturbation for each task). A part of a
recipe then takes at least max(arithmetic / its product's speed, bytes / bandwidth), and
the recipe the sum of its parts: "attainable". Bytes are the fewest an unfused program
moves: every activation written once by its convolution, read for the statistics, read
by the pool, and as much again in the backward pass, where two products read its
cotangent.

Time is the best of many calls, so that other programs disturb it less, of programs
compiled as meta-steps are.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import episodes, learned_optimizers
from metalstm.nn.convolution import conv2d
from metalstm.runtime.compilation import Jitted

LOOP = 8  # dependent calls in one timed program
HIDDEN = 20
BLOCK = 8192  # coordinates that go through the rule at once


class Part(NamedTuple):
    name: str
    gflop: float
    speed: float  # GFLOP/s that a product of this shape reaches
    gbytes: float
    bandwidth: float  # GB/s
    tanhs: float = 0.0  # 1e9
    tanh_speed: float = 1.0  # 1e9 per second

    @property
    def compute(self) -> float:
        return self.gflop / self.speed + self.tanhs / self.tanh_speed

    @property
    def memory(self) -> float:
        return self.gbytes / self.bandwidth

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)


def best(fn: Callable, *args: Any, seconds: float, jit: Callable = Jitted) -> float:
    """Best seconds of one of ``LOOP`` dependent calls of ``fn``, which makes an array.

    Its last argument, the smallest, is scaled by what the call before made: nothing can
    be hoisted out of the loop.
    """

    def body(carry, args):
        *others, last = args
        return fn(*others, last * (1 + 1e-9 * carry)).ravel()[0]

    return _best_of_loop(body, jnp.float32(0), args, seconds, jit)


def best_pass(fn: Callable, x: jax.Array, *, seconds: float) -> float:
    """The same of an elementwise ``fn``, applied again and again to its own result."""
    return _best_of_loop(lambda x, _: fn(x), x, (), seconds, Jitted)


def _best_of_loop(
    body: Callable, start: jax.Array, args: Any, seconds: float, jit: Callable
) -> float:
    @jit
    def loop(start, args):
        step = lambda carry, _: (body(carry, args), None)  # noqa: E731
        return lax.scan(step, start, length=LOOP)[0]

    jax.block_until_ready(loop(start, args))
    fastest, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        jax.block_until_ready(loop(start, args))
        fastest, calls = min(fastest, time.perf_counter() - begun), calls + 1
    return fastest / LOOP


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.float32)


class Machine:
    """Limits, each measured when first asked for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.probe = self.product(2048, 2048, 2048)
        # larger than caches, and small enough for one core's
        self.bandwidth, self.cache_bandwidth = map(self._pass, (2**24, 2**16))
        gates = draw(4 * HIDDEN, BLOCK)
        took = best_pass(jnp.tanh, gates, seconds=seconds)
        self.tanh = 1e-9 * gates.size / took

    def _pass(self, size: int) -> float:
        """GB/s of 4 bytes read and 4 written."""
        took = best_pass(lambda x: 0.5 * x + 1, draw(size), seconds=self.seconds)
        return 8e-9 * size / took

    @functools.cache  # noqa: B019 (one machine a run)
    def product(self, rows: int, inner: int, columns: int) -> float:
        """GFLOP/s of [rows, inner] by [inner, columns]."""
        left, right = draw(rows, inner), draw(inner, columns)
        if rows < columns:
            took = best(lambda b, a: a @ b, right, left, seconds=self.seconds)
        else:
            took = best(jnp.matmul, left, right, seconds=self.seconds)
        return 2e-9 * rows * inner * columns / took

    @functools.cache  # noqa: B019
    def products(self, count: int, rows: int, inner: int, columns: int) -> float:
        """GFLOP/s of as many products of [rows, inner] by [inner, columns].

        By the faster of two compilations: a device to each core has YNNPACK's.
        """
        left, right = draw(count, rows, inner), draw(count, inner, columns)
        product = functools.partial(best, lambda b, a: a @ b, right, left)
        took = min(product(seconds=self.seconds, jit=jit) for jit in (Jitted, jax.jit))
        return 2e-9 * count * rows * inner * columns / took

    @functools.cached_property
    def normals(self) -> float:
        """1e9 normal numbers a second."""
        key = jax.random.key(0)

        def again(x):
            new = jax.random.fold_in(key, x[0, 0].astype(jnp.int32))
            return jax.random.normal(new, x.shape)

        x = draw(128, 4096)
        return 1e-9 * x.size / best_pass(again, x, seconds=self.seconds)

    @functools.cache  # noqa: B019
    def convolution(self, images, pixels, channels, filters, strides) -> float:
        """GFLOP/s of the convolution alone, in the default form."""
        conv = functools.partial(conv2d, strides=strides)
        x, kernel = (
            draw(images, pixels, pixels, channels),
            draw(3, 3, channels, filters),
        )
        took = best(conv, x, kernel, seconds=self.seconds)
        return conv_gflop(images, pixels, channels, filters, strides) / took


def conv_gflop(images, pixels, channels, filters, strides) -> float:
    out = -(-pixels // strides)
    return 18e-9 * images * out * out * channels * filters


def layers(row: dict, images: int) -> list[tuple[int, int, int, int, int]]:
    """(images, pixels, channels, filters, strides) of the four convolutions."""
    pixels, channels = row["image"]
    filters = row.get("filters", 32)
    strides = 2 if row.get("downsample") == "stride" else 1
    found = []
    for _ in range(4):
        found.append((images, pixels, channels, filters, strides))
        pixels = -(-pixels // 2) if strides == 2 else pixels // 2
        channels = filters
    return found


def learner_parts(machine: Machine, row: dict, images: int, times: float) -> list[Part]:
    """``times`` gradients of the learner on ``images`` images, layer by layer."""
    parts = []
    for index, shape in enumerate(layers(row, images)):
        _, pixels, channels, filters, strides = shape
        out = -(-pixels // strides)
        gflop = times * conv_gflop(*shape)
        activation = 4e-9 * images * out * out * filters
        inputs = 4e-9 * images * pixels * pixels * channels
        in_cache = activation < 5e-4
        bandwidth = machine.cache_bandwidth if in_cache else machine.bandwidth
        forward = machine.convolution(*shape)
        # the kernel's derivative is a product over a block of images
        block = out * out * min(images, max(1, 9240 // (out * out)))
        shifts = (9, 1) if channels <= 8 or strides == 2 else (3, 3)
        derivative = machine.product(shifts[0] * channels, block, shifts[1] * filters)

        def add(what, gflop, speed, gbytes, name=index + 1, bandwidth=bandwidth):
            name = f"{images} images, block {name}: {what}"
            parts.append(Part(name, gflop, speed, times * gbytes, bandwidth))

        add("convolution", gflop, forward, inputs + activation)
        add("kernel's derivative", gflop, derivative, inputs + activation)
        if index:  # the same function on the flipped kernel
            add("input's derivative", gflop, forward, inputs + activation)
        passes = 6 if strides == 2 else 4.5  # a pool writes a quarter
        add("norm, ReLU, pool", 0, 1, passes * activation)
    return parts


def rule_parts(
    machine: Machine, coordinates: int, steps: int, features: int, layer: int = 1
) -> list[Part]:
    """An LSTM layer forward, and again with its derivative: replayed, then back."""
    width, block = features + HIDDEN, min(BLOCK, coordinates)
    total = coordinates * steps
    gflop = 2e-9 * 4 * HIDDEN * width * total
    tanhs = 5e-9 * HIDDEN * total
    array = 4e-9 * HIDDEN * total  # one [H, N] of each step
    forward = machine.product(4 * HIDDEN, width, block)
    to_state = machine.product(width, 4 * HIDDEN, block)
    to_kernel = machine.product(4 * HIDDEN, block, width)

    def part(what, speed, arrays, tanhs=0.0):
        name = f"rule, layer {layer}: {what}"
        bandwidth = machine.bandwidth
        return Part(name, gflop, speed, arrays * array, bandwidth, tanhs, machine.tanh)

    # `lstm_step` keeps six arrays of a step, and the backward pass reads them
    return [
        part("forward", forward, 4, tanhs),
        part("replay", forward, 6, tanhs),
        part("state's derivative", to_state, 6),
        part("kernel's derivative", to_kernel, 1),
    ]


def episode_parts(machine: Machine, row: dict) -> list[Part]:
    """One task's share of a meta-step."""
    times = row["steps"] * (3 if row.get("second_order") else 1)
    parts = learner_parts(machine, row, 5 * row["shot"], times)
    parts += learner_parts(machine, row, 75, 1)
    if row.get("rule") not in ("sgd", "compare"):
        parts += rule_parts(machine, 32_901, row["steps"], 2)
    return parts


def evolution_parts(machine: Machine, tasks: int, coordinates: int) -> list[Part]:
    """Both signs of each task, forward, with kernels of their own, and the noise."""
    total = 2 * learned_optimizers.UNROLL * tasks * coordinates
    parts, numbers = [], 2 * HIDDEN + 1
    for layer, width in ((1, 2 + HIDDEN), (2, 2 * HIDDEN)):
        if tasks == 1:
            speed = machine.product(4 * HIDDEN, width, coordinates)
        else:  # few coordinates each: the gates are last
            speed = machine.products(tasks, coordinates, width, 4 * HIDDEN)
        parts.append(
            Part(
                f"rule, layer {layer}: forward",
                2e-9 * 4 * HIDDEN * width * total,
                speed,
                4 * 4e-9 * HIDDEN * total,
                machine.cache_bandwidth if tasks > 1 else machine.bandwidth,
                5e-9 * HIDDEN * total,
                machine.tanh,
            )
        )
        numbers += 4 * HIDDEN * (width + 1)
    noise = 1e-9 * tasks * numbers
    parts.append(Part("noise", 0, 1, 0, 1, noise, machine.normals))
    return parts


def optimizer_parts(machine: Machine, row: dict) -> list[Part]:
    """One truncated unroll of a learned optimizer of two layers."""
    steps = learned_optimizers.UNROLL
    quadratics = row["problem"] == "quadratics"
    coordinates = 128 * 10 if quadratics else 15_910
    if row["estimator"] == "pes":
        parts = evolution_parts(machine, *((128, 10) if quadratics else (1, 15_910)))
        steps *= 2
    else:
        parts = rule_parts(machine, coordinates, steps, 2)
        parts += rule_parts(machine, coordinates, steps, HIDDEN, 2)
    if not quadratics:
        gflop = 6e-9 * 128 * coordinates * steps
        speed = machine.product(128, 784, 20)
        parts.append(Part("the network itself", gflop, speed, 0, 1))
    return parts


def show(machine: Machine, title: str, parts: list[Part], markdown: bool) -> None:
    seconds = sum(part.seconds for part in parts)
    gflop = sum(part.gflop for part in parts)
    share = gflop / seconds / machine.probe
    rate = f"{1 / seconds:.2f} a second, {100 * share:.0f}% of the probe"
    print(f"\n{'### ' if markdown else ''}{title}: attainable {rate}")
    head = ("part", "GFLOP", "GFLOP/s at this shape", "GB", "ms", "limit")
    line(head, markdown)
    if markdown:
        line(["---"] * len(head), markdown)
    for part in sorted(parts, key=lambda part: -part.seconds):
        if part.seconds < 0.01 * seconds:
            continue
        limit = "compute" if part.compute >= part.memory else "memory"
        speed = f"{part.speed:.0f}" if part.gflop else ""
        cells = [part.name, f"{part.gflop:.2f}", speed, f"{part.gbytes:.3f}"]
        line([*cells, f"{1e3 * part.seconds:.1f}", limit], markdown)


def line(cells, markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(cells) + " |", flush=True)
    else:
        first, *rest = cells
        print(f"  {first:46}" + "".join(f"{cell:>22}" for cell in rest), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="recipes containing this")
    parser.add_argument("--seconds", type=float, default=0.3, help="a measurement")
    parser.add_argument("--markdown", action="store_true", help="tables for the docs")
    arguments = parser.parse_args()
    machine = Machine(arguments.seconds)
    print(
        f"{jax.default_backend()}, probe {machine.probe:.0f} GFLOP/s; elementwise "
        f"{machine.bandwidth:.1f} GB/s over 64 MiB, {machine.cache_bandwidth:.1f} over "
        f"256 KiB; {machine.tanh:.2f}e9 tanh/s"
    )
    recipes: dict[str, tuple[Callable, dict]] = {
        name: (episode_parts, episodes.ROWS[name])
        for name in episodes.TARGETS
        if "seeds" not in episodes.ROWS[name]  # several are several times one
    }
    recipes |= {
        name: (optimizer_parts, row)
        for name, row in learned_optimizers.ROWS.items()
        if "seeds" not in row
    }
    for name, (parts, row) in recipes.items():
        if arguments.only in name:
            show(machine, name, parts(machine, row), arguments.markdown)
    again = Machine.product.__wrapped__(machine, 2048, 2048, 2048)
    print(f"\nprobe {again:.0f} GFLOP/s at the end")
    if abs(again - machine.probe) > 0.15 * machine.probe:
        print("the probes differ by more than 15%: the machine was busy, run it again")


if __name__ == "__main__":
    main()
