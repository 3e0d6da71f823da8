"""Start a network from the weights of another that was trained before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import LearnerState, PyTree

__all__ = ["Start", "init_from"]


_WRAPPERS = ("body", "embedding")  # what heads and comparisons put around a network
_NEW_PARTS = ("head", "comparison", "generator", "memory_net")


class Start(NamedTuple):
    """A learner that starts from trained weights."""

    state: LearnerState
    taken: tuple[str, ...]  # names of the arrays that came from the trained one
    left: tuple[
        str, ...
    ]  # of those that are as they were drawn: heads that do not fit, say


def init_from(
    state: LearnerState,
    trained: LearnerState,
    *,
    new_parts: Sequence[str] = _NEW_PARTS,
) -> Start:
    """Take a trained learner's parameters, batch statistics and variables.

    Arrays are matched by their names, without the ``body`` or ``embedding`` that a head
    or a comparison puts around a network, so that theta_0 of a Meta-LSTM can come from
    a classifier, a prototypical network or another Meta-LSTM. A head is taken where it
    has the same shape; otherwise it stays as drawn (a tied head starts at zero).

    Args:
      state: of the learner that starts, as its ``init`` drew it.
      trained: of the one that was trained; arrays of any float type.
      new_parts: names in an array's path that mark what may be missing or of another
        shape in ``trained``: heads, and what methods learn next to the network.

    Returns:
      The state, its arrays copies of their own, with what was taken and what was left.

    Raises:
      ValueError: outside these parts, an array that only one of the two has, or whose
        shapes differ; a trained array that is not finite.
    """
    drawn, source = _by_name(state), _by_name(trained)
    for name, array in source.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise ValueError(
                f"trained has values in {name} that are NaN or infinite: use an "
                "earlier checkpoint"
            )
    chosen, taken, left = {}, [], []
    for name, array in drawn.items():
        other = source.get(name)
        if other is not None and np.shape(other) == np.shape(array):
            chosen[name] = jnp.array(other, dtype=array.dtype)
            taken.append(name)
        elif set(new_parts) & set(name.split(".")):
            chosen[name] = jnp.array(array)
            left.append(name)
        else:
            raise ValueError(_unlike(name, array, other))
    spare = [
        name
        for name in source
        if name not in drawn and not set(new_parts) & set(name.split("."))
    ]
    if spare:
        raise ValueError(
            f"trained has {', '.join(spare)}, which the new learner lacks: build both "
            "with the same options"
        )
    leaves = jax.tree_util.tree_leaves_with_path(state)
    of_state = [chosen[_name(path)] for path, _ in leaves]
    filled = jax.tree.unflatten(jax.tree.structure(state), of_state)
    return Start(filled, tuple(taken), tuple(left))


def _by_name(state: LearnerState) -> dict[str, PyTree]:
    return {
        _name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _name(path: tuple) -> str:
    """``params.conv1.kernel``, without wrappers."""
    group, *rest = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    while rest and rest[0] in _WRAPPERS:
        rest = rest[1:]
    return ".".join([group, *rest])


def _unlike(name: str, array: PyTree, other: PyTree | None) -> str:
    if other is None:
        return (
            f"trained has no {name} {list(np.shape(array))}: build both learners with "
            "the same options"
        )
    return (
        f"{name} is {list(np.shape(array))} in the new learner and "
        f"{list(np.shape(other))} in the trained one: build both with the same options"
    )
