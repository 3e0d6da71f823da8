"""Rows of a speed table: each timed in a process of its own, between two probes.

The probe is a 2048-square float32 matrix product. "share" is a row's arithmetic per
second over the probe's; "vs public" its rate per probe GFLOP/s over that of a public
implementation, whose machine's probe read 185 GFLOP/s, so that the machines cancel.
Both are ratios that another machine, or a busier one, should reproduce.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

__all__ = [
    "LARGE_PAGES",
    "PUBLIC_PROBE",
    "Recipe",
    "Target",
    "collect",
    "in_a_process",
    "one_device_to_a_core",
    "probe",
    "run",
    "show",
    "started",
    "timed",
]

PUBLIC_PROBE = 185.0
# XLA:CPU allocates the memory of a program for each call; in pages of 2 MiB the kernel
# hands it over faster. Read by glibc (2.35 or later, Linux) as the process starts.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Target(NamedTuple):
    """What a row is compared with, and its target."""

    public: float | None = None  # per second, on the machine of `PUBLIC_PROBE`
    times: float | None = None  # target: so many times the public rate
    share: float | None = None  # target: so much of the probe


class Recipe(NamedTuple):
    """What a row's train loop is made of."""

    algorithm: Any
    optimizer: Any
    sampler: Any
    data: Any  # a pool, or what else the sampler draws from


def one_device_to_a_core(num_tasks: int, *, share_one: bool = False) -> Any:
    """A mesh of a CPU's cores for these tasks, as ``--cpu-devices`` makes it.

    As many as divide the tasks; for one task None, or with ``share_one`` all of them,
    as ``--devices-per-task`` makes it. To be called before JAX starts.
    """
    import jax

    from metalstm.runtime import sharding
    from metalstm.runtime.compilation import cores

    share = cores() if share_one and num_tasks == 1 else 1
    most = max(n for n in range(1, cores() + 1) if share * num_tasks % n == 0)
    jax.config.update("jax_num_cpu_devices", most)
    return sharding.task_mesh(num_tasks, devices_per_task=share)


def started(
    recipe: Recipe, *, seeds: int, mesh: Any, **options: Any
) -> tuple[Callable, Any]:
    """A train loop with ``options`` and its first state, in place: of S seeds at once
    they lead with [S], and it is the seeds that are spread over the mesh."""
    import jax
    import jax.numpy as jnp

    from metalstm import init_train_state, make_train_loop
    from metalstm.meta.seeds import init_seeds, map_seeds
    from metalstm.meta.step import place_state
    from metalstm.runtime.sharding import place

    algorithm, optimizer, sampler, data = recipe
    episode = sampler.sample(jax.random.key(0), data)
    if seeds == 1:
        train = make_train_loop(algorithm, optimizer, sampler, mesh=mesh, **options)
        state = init_train_state(algorithm, optimizer, 0, episode)
        return train, place_state(algorithm, state, mesh)
    train = make_train_loop(algorithm, optimizer, sampler, **options)
    states = init_seeds(algorithm, optimizer, jnp.arange(seeds), episode)
    return map_seeds(train, mesh=mesh), place(states, mesh, per_task=True)


def probe() -> float:
    """GFLOP/s of a 2048-square float32 matrix product, the best of twenty."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048), jnp.float32) * 0.5
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / 1e9


def timed(step: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Median seconds of ``step``, which returns arrays; its first call compiles."""
    import jax
    import numpy as np

    before = probe()
    start = time.perf_counter()
    jax.block_until_ready(step())
    compile_seconds = time.perf_counter() - start
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        step_start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - step_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": float(np.median(times)),
        "compile_s": compile_seconds,
        "peak_gib": peak,
        "probe": [before, probe()],
    }


def collect(module: str, names: Iterable[str], seconds: float) -> Iterable[dict]:
    """The results of ``module``'s rows, each from a process of its own."""
    for name in names:
        command = ["-m", module, "--row", name, "--seconds", str(seconds)]
        yield {"row": name} | in_a_process(command)


def in_a_process(command: list[str], *, large_pages: bool = True) -> dict[str, Any]:
    """The JSON that ``python command`` prints last, or {"failed": its last line}."""
    environment = LARGE_PAGES | os.environ
    if not large_pages:
        environment = {k: v for k, v in environment.items() if k not in LARGE_PAGES}
    out = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    if out.returncode:
        words = out.stderr.strip().splitlines() or [f"exit status {out.returncode}"]
        return {"failed": words[-1]}
    return json.loads(out.stdout.strip().splitlines()[-1])


COLUMNS = (
    "row",
    "per s",
    "share",
    "target",
    "vs public",
    "target",
    "compile",
    "peak GiB",
    "probe GFLOP/s",
)


def show(results: Iterable[dict], targets: dict[str, Target], markdown: bool) -> int:
    """Print the table as its rows come; returns how many rows failed to run."""
    failed = 0
    _line(COLUMNS, markdown)
    if markdown:
        _line(["---"] * len(COLUMNS), markdown)
    for result in results:
        if "failed" in result:
            failed += 1
            _line([result["row"], result["failed"]], markdown)
            continue
        target = targets.get(result["row"], Target())
        to_public = ""
        if target.public:
            ratio = result["rate"] / max(result["probe"])
            to_public = f"{ratio / (target.public / PUBLIC_PROBE):.2f}x"
        cells = [
            result["row"],
            f"{result['rate']:.2f}",
            f"{100 * result['share']:.1f}%",
            f"{100 * target.share:.0f}%" if target.share else "",
            to_public,
            f"{target.times:g}x" if target.times else "",
            f"{result['compile_s']:.0f} s",
            f"{result['peak_gib']:.2f}",
            "-".join(f"{p:.0f}" for p in sorted(result["probe"])),
        ]
        _line(cells, markdown)
    return failed


def _line(cells: Iterable[str], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(cells) + " |", flush=True)
        return
    widths = (28, 9, 8, 7, 11, 7, 9, 10, 15)
    pairs = zip(cells, widths, strict=False)
    first, *rest = [(cell, width) for cell, width in pairs]
    line = f"{first[0]:{first[1]}}" + "".join(f"{c:>{w}}" for c, w in rest)
    print(line.rstrip(), flush=True)


def run(
    doc: str,
    tables: dict[str, tuple[Iterable[str], dict[str, Target]]],
    measure: Callable[[str, float], dict] | None = None,
) -> None:
    """The command line of a benchmark made of rows.

    Args:
      doc: the module's docstring; its first line is the help's.
      tables: for each module, its rows' names and their targets.
      measure: what times one row, in the module that owns it.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="rows containing this")
    parser.add_argument("--seconds", type=float, default=10, help="timed, per row")
    parser.add_argument("--markdown", action="store_true", help="a table for the docs")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row and measure:
        print(json.dumps(measure(arguments.row, arguments.seconds)))
        return
    targets = {k: v for _, own in tables.values() for k, v in own.items()}
    results = (
        result
        for module, (names, _) in tables.items()
        for result in collect(
            module, [n for n in names if arguments.only in n], arguments.seconds
        )
    )
    if show(results, targets, arguments.markdown):
        sys.exit(1)
