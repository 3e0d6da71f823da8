"""What happens on a plateau: who leaves it, and what the forget gates do there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.learned_optimizer.measuring import Bench, Optimizer
from metalstm.inner import first_order, unroll
from metalstm.plots import Losses
from metalstm.rules import find_gates

_PROBLEMS = 16


def share_escaped(losses: Losses, below: float) -> np.ndarray:
    """The share of problems whose loss is below ``below`` of the first, [S]."""
    return (losses.values < below * losses.values[:, :1]).mean(0)


def forget_gates(bench: Bench, rule: Optimizer, steps: int) -> np.ndarray | None:
    """f over the updates of a few problems, [problems, steps, N]; None without gates.

    The problems must be without minibatches.
    """
    family, data = bench.source.test, bench.source.data

    def one(key: jax.Array) -> Any:
        task_key, init_key = jax.random.split(key)
        task = family.sample(task_key, data)
        _, trace = unroll(
            lambda params, stats, batch, key: (family.loss(params, task, ()), stats),
            rule.tx,
            (),
            family.init(init_key, task),
            num_steps=steps,
            differentiation=first_order(),
            observe=lambda state: find_gates(state.rule_state),
        )
        return trace.observed

    keys = jax.random.split(jax.random.key(bench.test.test_seed), _PROBLEMS)
    gates = jax.jit(jax.vmap(one))(keys)
    return np.asarray(gates["forget"]) if "forget" in gates else None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| optimizer | escaped | updates until half have | mean f |",
        "|---|---|---|---|",
    ]
    for row in rows:
        half, forget = row["updates_to_half"], row.get("mean_forget")
        cells = [
            row["optimizer"],
            f"{row['escaped']:.0%}",
            "never" if half is None else f"{half:,}",
            "" if forget is None else f"{forget:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
