"""Start a network from the weights of another that was trained before."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import LearnerState, PyTree

__all__ = ["Start", "init_from"]


_WRAPPERS = ("body", "embedding")  # what heads and comparisons put around a network
# what may be missing in a trained learner, or of another shape: heads, and what methods
# learn next to the network
_NEW_PARTS = frozenset({"head", "comparison", "generator", "memory_net"})


class Start(NamedTuple):
    """A learner that starts from trained weights."""

    state: LearnerState
    taken: tuple[str, ...]  # names of the arrays that came from the trained one
    left: tuple[
        str, ...
    ]  # of those that are as they were drawn: heads that do not fit, say


def init_from(state: LearnerState, trained: LearnerState) -> Start:
    """Take a trained learner's parameters, batch statistics and variables.

    Arrays are matched by their names in the network itself, without the ``body`` or
    ``embedding`` that a head or a comparison puts around it, so that theta_0 of a
    Meta-LSTM can come from a classifier, a prototypical network or another Meta-LSTM.
    A head is taken where it has the same shape; otherwise it stays as drawn (a tied
    head starts at zero).

    Args:
      state: of the learner that starts, as its ``init`` drew it.
      trained: of the one that was trained; arrays of any float type.

    Returns:
      The state, its arrays copies of their own, with what was taken and what was left.

    Raises:
      ValueError: outside these parts, an array that only one of the two has, or whose
        shapes differ; a trained array that is not finite.
      TypeError: ``trained`` is no `LearnerState`.
    """
    if not isinstance(trained, LearnerState):
        raise TypeError(
            f"trained is a {type(trained).__name__}, not the LearnerState of a "
            "network: give the .params of a trained method, or their .learner"
        )
    drawn, source = _by_place(state), _by_place(trained)
    for place, array in source.items():
        if isinstance(array, jax.core.Tracer):
            continue  # its values are not known yet
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise ValueError(
                f"trained has values in {place.name} that are NaN or infinite: use an "
                "earlier checkpoint"
            )
    heads = _by_name_alone(source, drawn)
    chosen, taken, left = {}, [], []
    for place, array in drawn.items():
        new = bool(_NEW_PARTS & set(place.path))
        other = source.get(place, heads.get(place.name) if new else None)
        if other is not None and np.shape(other) == np.shape(array):
            chosen[place] = jnp.array(other, dtype=array.dtype)
            taken.append(place.name)
        elif new:
            chosen[place] = jnp.array(array)
            left.append(place.name)
        else:
            raise ValueError(_unlike(place.name, array, other))
    spare = [
        place.name
        for place in source
        if place not in drawn and not _NEW_PARTS & set(place.path)
    ]
    if spare:
        raise ValueError(
            f"trained has {', '.join(spare)}, which the new learner lacks: build both "
            "with the same options"
        )
    of_state = [chosen[place] for place in drawn]
    filled = jax.tree.unflatten(jax.tree.structure(state), of_state)
    return Start(filled, tuple(taken), tuple(left))


class _Place(NamedTuple):
    """Where an array is: in the network itself, or in what is put around it."""

    group: str  # params, stats or other
    around: int  # 0: in the network; 1: next to its wrapper; 2: next to that one's ...
    path: tuple[str, ...]  # without wrappers

    @property
    def name(self) -> str:
        return ".".join((self.group, *self.path))


def _by_place(state: LearnerState) -> dict[_Place, PyTree]:
    """In the order of the leaves."""
    found = {}
    for group in state._fields:
        leaves = jax.tree_util.tree_leaves_with_path(getattr(state, group))
        paths = [tuple(map(_key, path)) for path, _ in leaves]
        _, places = _unwrapped(paths)
        for (around, path), (_, leaf) in zip(places, leaves, strict=True):
            found[_Place(group, around, path)] = leaf
    return found


def _key(entry: Any) -> str:
    return jax.tree_util.keystr((entry,), simple=True)


def _unwrapped(
    paths: list[tuple[str, ...]],
) -> tuple[int, list[tuple[int, tuple[str, ...]]]]:
    """Return the number of wrappers, and ``around`` and ``path`` of each array.

    A wrapper stands alone, or next to new parts; a network of one's own that has a
    ``body`` next to other layers is not wrapped.
    """
    first = {path[:1] for path in paths}
    wrappers = [name for name in _WRAPPERS if (name,) in first]
    others = {name for one in first for name in one} - set(wrappers)
    if () in first or len(wrappers) != 1 or not others <= _NEW_PARTS:
        return 0, [(0, path) for path in paths]
    within = [path[1:] for path in paths if path[0] == wrappers[0]]
    depth, places = _unwrapped(within)
    rest = iter(places)
    return depth + 1, [
        next(rest) if path[0] == wrappers[0] else (depth + 1, path) for path in paths
    ]


def _by_name_alone(
    source: dict[_Place, PyTree], drawn: dict[_Place, PyTree]
) -> dict[str, PyTree]:
    """Arrays of ``source`` without the same place in ``drawn``, of unique names.

    So a head within a network can start one that is put around it.
    """
    spare = [place for place in source if place not in drawn]
    names = [place.name for place in spare]
    return {
        place.name: source[place] for place in spare if names.count(place.name) == 1
    }


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
