"""Any pytree of parameters as one float32 vector of coordinates, and back."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from metalstm.base import Array, PyTree

__all__ = ["coordinate_dtype", "flatten", "leaf_sizes", "unflatten"]


def leaf_sizes(tree: PyTree) -> list[int]:
    """Coordinates of each leaf, in `jax.tree.leaves` order (masked nodes have none)."""
    return [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]


def coordinate_dtype(tree: PyTree) -> jnp.dtype:
    """float32, or float64 where a leaf is: what a rule computes in."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def flatten(tree: PyTree) -> Array:
    """All leaves, raveled and joined: [N] of `coordinate_dtype`."""
    dtype = coordinate_dtype(tree)
    leaves = [jnp.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros((0,), dtype)
    return jnp.concatenate([leaf.astype(dtype) for leaf in leaves])


def unflatten(flat: Array, like: PyTree) -> PyTree:
    """The inverse of `flatten`: shapes and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    out, offset = [], 0
    for leaf, size in zip(leaves, leaf_sizes(like), strict=True):
        part = flat[offset : offset + size]
        out.append(part.reshape(jnp.shape(leaf)).astype(jnp.result_type(leaf)))
        offset += size
    return jax.tree.unflatten(treedef, out)
