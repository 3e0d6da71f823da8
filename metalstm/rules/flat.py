"""Any pytree of parameters as one vector of coordinates, and back.

Notation: N coordinates, all parameters together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metalstm.base import Array, PyTree

__all__ = [
    "coordinate_dtype",
    "flatten",
    "leaf_sizes",
    "per_coordinate_leaves",
    "unflatten",
]


def leaf_sizes(tree: PyTree) -> list[int]:
    """Coordinates of each leaf, in `jax.tree.leaves` order (masked nodes have none)."""
    return [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]


def coordinate_dtype(tree: PyTree) -> jnp.dtype:
    """float32, or float64 where a leaf is: what a rule computes in."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def flatten(tree: PyTree, dtype: jnp.dtype | None = None) -> Array:
    """Ravel and join all leaves: [N] of ``dtype``, by default `coordinate_dtype`.

    >>> flatten({"a": jnp.ones((1, 2)), "b": jnp.zeros(())})
    Array([1., 1., 0.], dtype=float32)
    """
    dtype = coordinate_dtype(tree) if dtype is None else dtype
    leaves = [jnp.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros((0,), dtype)
    return jnp.concatenate([leaf.astype(dtype) for leaf in leaves])


def unflatten(flat: Array, template: PyTree, params: PyTree = None) -> PyTree:
    """Invert `flatten`: [..., N] -> leaves [..., *shape] of ``template``'s dtypes.

    Of gradients that are less precise than ``params``, updates have the type of these.
    """
    leaves, treedef = jax.tree.flatten(template)
    others = leaves if params is None else jax.tree.leaves(params)
    out, offset = [], 0
    for leaf, other, size in zip(leaves, others, leaf_sizes(template), strict=True):
        part = flat[..., offset : offset + size]
        shape = (*flat.shape[:-1], *jnp.shape(leaf))
        out.append(part.reshape(shape).astype(jnp.result_type(leaf, other)))
        offset += size
    return jax.tree.unflatten(treedef, out)


def per_coordinate_leaves(
    init: Callable[[PyTree], PyTree], params: PyTree
) -> PyTree | None:
    """Say for each leaf of a rule's state whether its last axis is the coordinates'.

    A leaf is when it grows with the vector of parameters. The others are shared by all
    coordinates.

    Args:
      init: of a bound rule, ``params -> state``.
      params: the parameters, or their shapes.

    Returns:
      A bool for each leaf of the state; None where the state does not separate over
      coordinates: the parameters differ in dtype, or the state of the vector of all of
      them would not look like that of ``params``.
    """
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    size = sum(leaf_sizes(params))
    of_tree, of_vector, of_longer = (
        jax.eval_shape(init, p)
        for p in (
            params,
            jax.ShapeDtypeStruct((size,), dtype),
            jax.ShapeDtypeStruct((size + 1,), dtype),
        )
    )
    treedef = jax.tree.structure(of_tree)
    if {treedef} != {jax.tree.structure(of_vector), jax.tree.structure(of_longer)}:
        return None
    grows = []
    for leaf, same, longer in zip(
        *map(jax.tree.leaves, (of_tree, of_vector, of_longer)), strict=True
    ):
        if leaf.shape != same.shape or same.shape[:-1] != longer.shape[:-1]:
            return None
        grows.append(same.shape != longer.shape)
    return jax.tree.unflatten(treedef, grows)
