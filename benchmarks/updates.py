"""What an update of an optimizer costs: learned rules next to AdamW, in one process.

    taskset -c 0 python -m benchmarks.updates                    # every row
    taskset -c 0 python -m benchmarks.updates adamw moment_gates

The model is an MLP of 784-1024-256-10 (1.07M parameters), batch 128. "update" is the
update alone, "step" gradient and update in one program, "in cache" an update of 16,384
parameters whose arrays do not leave the core's cache: arithmetic, and what starts each
operation. The optimizers take turns of a few calls, as in training each call follows
one of its own. A ratio is the median over rounds of a row's time over the first row's
in the same round. On a CPU times are of the processor, so that other processes change
them less. "temporary" is what an update's program allocates while it runs, "state" what
the optimizer keeps.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import muon

from metalstm import rules

__all__ = ["OPTIMIZERS", "Program", "in_turn", "programs"]

LAYERS, BATCH = (784, 1024, 256, 10), 128
IN_CACHE, REPEATS = (128, 128), 64
CALLS = 6  # of a program in its turn
KINDS = ("update", "step", "in cache")


def _fresh(name: str, **options: Any) -> Any:
    rule = getattr(rules, name)(**options)
    weights = rule.init(jax.random.key(0), ())
    return rules.with_progress(rule.bind(weights), 1_000)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "muon": lambda: muon(1e-3),
    "moment_gates": lambda: _fresh("moment_gates"),
    "orthogonal gates": lambda: _fresh("moment_gates", orthogonal=True),
    "moment_network": lambda: _fresh("moment_network"),
    "moment_lstm": lambda: _fresh("moment_lstm"),
    "l2l": lambda: _fresh("l2l"),
}


class Program(NamedTuple):
    compiled: Any  # (params, state, grads) -> params, state; both are donated
    args: list[Any]
    num_parameters: int
    num_updates: int  # of one call


def programs(tx: Any) -> dict[str, Program]:
    """Compile the three that a row is made of."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    pairs = list(itertools.pairwise(LAYERS))
    params = [{"w": normal(a, b) / a**0.5, "b": jnp.zeros(b)} for a, b in pairs]
    x, y = normal(BATCH, LAYERS[0]), jnp.arange(BATCH) % LAYERS[-1]

    def loss(params):
        hidden = x
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"])
        logits = hidden @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(params, state, grads):
        del grads
        return update(params, state, jax.grad(loss)(params))

    def in_cache(params, state, grads):
        def body(_, carry):
            return update(carry[0], carry[1], grads)

        return jax.lax.fori_loop(0, REPEATS, body, (params, state))

    grads, small = jax.grad(loss)(params), normal(*IN_CACHE)
    return {
        "update": _compile(update, tx, params, grads, 1),
        "step": _compile(step, tx, params, grads, 1),
        "in cache": _compile(in_cache, tx, small, jnp.sin(small), REPEATS),
    }


def _compile(fn: Callable, tx, params, grads, num_updates: int) -> Program:
    args = [*jax.tree.map(jnp.array, (params, tx.init(params))), grads]  # copies
    compiled = jax.jit(fn, donate_argnums=(0, 1)).lower(*args).compile()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Program(compiled, args, size, num_updates)


def in_turn(rows: list[Program], rounds: int) -> list[list[float]]:
    """Seconds of a call of every program, round after round."""
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    found: list[list[float]] = [[] for _ in rows]
    for number in range(rounds):
        order = list(enumerate(rows))
        for index, row in order if number % 2 else reversed(order):
            for call in range(CALLS):
                if call == 1:  # the first finds the cache as another row left it
                    start = clock()
                row.args[:2] = jax.block_until_ready(row.compiled(*row.args))
            found[index].append((clock() - start) / (CALLS - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each program")
    arguments = parser.parse_args()
    names = arguments.rows or list(OPTIMIZERS)
    if unknown := set(names) - set(OPTIMIZERS):
        parser.error(f"no row {unknown}: choose from {', '.join(OPTIMIZERS)}")
    table = {name: programs(OPTIMIZERS[name]()) for name in names}
    print(f"milliseconds and (times {names[0]}); in cache: ns a parameter")
    print(f"{'':18}" + "".join(f"{kind:>16}" for kind in KINDS), end="")
    print(f"{'temporary, MiB':>16}{'state, bytes a parameter':>26}")
    columns = {
        kind: in_turn([table[name][kind] for name in names], arguments.rounds)
        for kind in KINDS
    }
    for index, name in enumerate(names):
        line = f"{name:18}"
        for kind, found in columns.items():
            program, first = table[name][kind], found[0]
            ratio = median(a / b for a, b in zip(found[index], first, strict=True))
            value = 1e3 * median(found[index])
            if kind == "in cache":
                value *= 1e6 / program.num_updates / program.num_parameters
            line += f"{value:8.2f} ({ratio:5.2f})"
        update = table[name]["update"]
        temporary = update.compiled.memory_analysis().temp_size_in_bytes
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(update.args[1]))
        line += f"{temporary / 2**20:16.1f}{state / update.num_parameters:26.1f}"
        print(line)


if __name__ == "__main__":
    main()
