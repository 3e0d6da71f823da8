"""Drawing integers, and images in groups, from uniform numbers.

Shapes: C classes, M image slots a class.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from metalstm.base import Array
from metalstm.data.pools import ClassPool

__all__ = ["draw_distinct", "draw_grouped", "grouped_capacity", "to_integers"]


def to_integers(uniform: Array, size: Any) -> Array:
    """Return the integer of range(size) that each number of [0, 1) falls on.

    >>> to_integers(jnp.array([0.0, 0.49, 0.51]), 2)
    Array([0, 0, 1], dtype=int32)
    """
    # the product may round up to size
    scaled = uniform * jnp.asarray(size, uniform.dtype)
    return jnp.minimum(scaled.astype(jnp.int32), size - 1)


def draw_distinct(uniform: Array, size: Any) -> Array:
    """Draw ``num`` distinct integers of range(size), in random order.

    ``uniform`` [2, num] is in [0, 1); ``size`` may be traced. Floyd's algorithm: step k
    draws from range(size - num + k + 1), and takes the last integer of this range where
    what it drew was chosen before. The cost depends on ``num`` alone, where shuffling
    600 images to take 20 costs ten times as much.
    """
    num = uniform.shape[1]
    step = jnp.arange(num, dtype=jnp.int32)
    last = size - num + step
    drawn = to_integers(uniform[0], last + 1)
    # It was chosen before if it was drawn before, or if it is the last integer of an
    # earlier step which took that one. Such steps are chains, whose links double here:
    # an accelerator takes longer to start `num` small operations than to run these.
    earlier = step[None] < step[:, None]
    was_chosen = jnp.any(earlier & (drawn[None] == drawn[:, None]), 1)
    link = drawn - (size - num)
    link = jnp.where((link >= 0) & (link < step), link, step)
    for _ in range((num - 1).bit_length()):
        was_chosen |= _at(was_chosen, link)
        link = _at(link, link)
    chosen = jnp.where(was_chosen, last, drawn)
    return _at(chosen, jnp.argsort(uniform[1]))


def _at(x: Array, places: Array) -> Array:
    """As x[places], none of which is negative or too large."""
    return x.at[places].get(mode="promise_in_bounds", wrap_negative_indices=False)


def draw_grouped(
    key: Array, pool: ClassPool, classes: Array, *, shot: int, queries: int
) -> Array:
    """Draw image slots [way, shot + queries], the support's first, no group in both."""

    def draw(uniform: Array, count: Array, groups: Array) -> Array:
        in_support = _support_side(uniform[0], count, groups)
        valid = jnp.arange(groups.shape[0]) < count
        # The support's side in random order, then the query's; padding is last.
        order = jnp.argsort(
            jnp.where(valid, uniform[1] + jnp.where(in_support, 0, 1), jnp.inf)
        )
        start = jnp.sum(in_support & valid)
        query = jax.lax.dynamic_slice_in_dim(order, start, queries)
        return jnp.concatenate([order[:shot], query])

    assert pool.groups is not None
    groups = pool.groups[classes]
    uniform = jax.random.uniform(key, (len(classes), 2, groups.shape[1]))
    return jax.vmap(draw)(uniform, pool.counts[classes], groups)


def _support_side(uniform: Array, count: Array, groups: Array) -> Array:
    """Say of each image [M] whether its group is in the random half for the support."""
    num_slots = groups.shape[0]
    valid = jnp.arange(num_slots) < count
    present = jnp.zeros(num_slots, bool).at[groups].max(valid)
    priority = jnp.where(present, uniform, jnp.inf)
    rank = jnp.argsort(jnp.argsort(priority))
    return (rank < present.sum() // 2)[groups]


def grouped_capacity(pool: ClassPool) -> Array:
    """Return [C, 2]: images on the support's and the query's side in the worst draw."""

    def capacity(count: Array, groups: Array) -> Array:
        valid = jnp.arange(groups.shape[0]) < count
        sizes = jnp.zeros(groups.shape[0], jnp.int32).at[groups].add(valid)
        num_groups = (sizes > 0).sum()
        # smallest first, groups that do not exist last
        ranked = jnp.sort(jnp.where(sizes > 0, sizes, sizes.sum() + 1))
        index = jnp.arange(groups.shape[0])
        side = num_groups // 2
        return jnp.stack(
            [
                jnp.where(index < side, ranked, 0).sum(),
                jnp.where(index < num_groups - side, ranked, 0).sum(),
            ]
        )

    assert pool.groups is not None
    return jax.vmap(capacity)(pool.counts, pool.groups)
