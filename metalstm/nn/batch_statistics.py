"""The three things a pass may do with batch statistics, for any flax module."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp

from metalstm.base import Norm, PyTree
from metalstm.checks import check_choice

__all__ = ["run_with_statistics"]


def run_with_statistics(
    run: Callable, stats: PyTree, norm: Norm, *, differentiable: bool
) -> tuple:
    """Do one pass of a module by ``norm``.

    Args:
      run: statistics -> (outputs, statistics after it, other variables); it normalises
        by the batch unless ``norm`` is "stored".
      stats: the averages before the pass.
      norm: see `metalstm.base.Norm`.
      differentiable: False where the module stops gradients at its averages.

    Returns:
      (outputs, statistics after the pass, other variables).

    Raises:
      ValueError: another ``norm``.
    """
    check_choice("norm", norm, get_args(Norm))
    if norm == "stored" or not jax.tree.leaves(stats):
        outputs, _, other = run(stats)
        return outputs, stats, other
    if norm == "batch":
        return run(stats)
    return _gather(run, stats, differentiable=differentiable)


def _gather(run: Callable, stats: PyTree, *, differentiable: bool) -> tuple:
    """One pass after which the averages are this batch's, whatever the momentum m.

    A moving average is affine in its old value, new = m * old + (1 - m) * batch. The
    pass at old = 0 gives (1 - m) * batch, and its derivative by the old value gives m.
    No output depends on the old value, so the derivative costs nothing. Where the
    module stops gradients (``differentiable=False``) a second pass at a large old value
    gives m instead; compiled, the two share all but the averages. An average that
    the pass leaves alone (m = 1) comes back as it was.
    """
    leaves, treedef = jax.tree.flatten(stats)
    where = [
        i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]

    def averages(old):
        filled = list(leaves)
        for i, leaf in zip(where, old, strict=True):
            filled[i] = leaf
        outputs, new, other = run(jax.tree.unflatten(treedef, filled))
        new = jax.tree.leaves(new)
        return [new[i] for i in where], (outputs, new, other)

    zeros = [jnp.zeros_like(leaves[i]) for i in where]
    if differentiable:
        ones = [jnp.ones_like(leaf) for leaf in zeros]
        weighted, momentum, aux = jax.jvp(averages, (zeros,), (ones,), has_aux=True)
    else:
        large = 2.0**20
        weighted, aux = averages(zeros)
        shifted, _ = averages([jnp.full_like(leaf, large) for leaf in zeros])
        momentum = [(b - a) / large for a, b in zip(weighted, shifted, strict=True)]
    outputs, gathered, other = aux
    for i, new, m in zip(where, weighted, momentum, strict=True):
        untouched = m == 1
        batch = new / jnp.where(untouched, 1, 1 - m)
        gathered[i] = jnp.where(untouched, leaves[i], batch).astype(leaves[i].dtype)
    return outputs, jax.tree.unflatten(treedef, gathered), other
