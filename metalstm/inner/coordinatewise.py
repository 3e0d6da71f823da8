"""The first-order derivative of a coordinate-wise rule, block by block of coordinates.

With gradients and losses held constant such a rule separates over coordinates. So the
inner loop runs without a derivative and keeps what went in; here the rule alone runs
over it again, and is differentiated, on a block of coordinates at a time, which stays
in cache.

Over a mesh with a ``"coordinate"`` axis (`runtime.sharding.task_mesh`) each device
has the rule's part of the work for its share of the coordinates: theta is gathered
before each gradient, and on the way back only the sums for the rule's parameters and
theta_0 travel.

Letters: N coordinates, this device's share of them, padded to whole blocks, T steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from metalstm.base import Array, PyTree
from metalstm.inner.scanning import Memory, cut, scan, with_gradient
from metalstm.runtime import sharding
from metalstm.runtime.compilation import cores_to_spare

__all__ = ["Coordinates", "Recorded", "keeps_states", "per_coordinate", "replay_rule"]

# Coordinates, by whether a device has several cores: smaller blocks stay in cache but
# leave a second core idle (MNIST MLP on a core each: 6.4 meta-steps/s for 5.5).
_BLOCK = {False: 1024, True: 8192}
_LANES = 16  # a block is a multiple of the vector registers' float32s
_MOST_BYTES = 2**28  # of states that are kept: larger ones are computed again


class Coordinates:
    """All leaves of parameters of one dtype as one vector [N], and back.

    Args:
      params: the parameters.
      own: for each leaf of the rule's state whether its last axis is the coordinates'.
    """

    def __init__(self, params: PyTree, own: PyTree):
        leaves, self._treedef = jax.tree.flatten(params)
        self._shapes = [jnp.shape(leaf) for leaf in leaves]
        self._own = own
        self._total = sum(map(math.prod, self._shapes))
        self._shares = sharding.coordinate_devices()
        share = -(-self._total // self._shares)
        on_one_core = jax.default_backend() == "cpu" and not cores_to_spare()
        self.num_blocks = -(-share // _BLOCK[not on_one_core])
        self._block = -(-share // self.num_blocks)
        if share >= _LANES**2:  # then what is added is little
            self._block = _LANES * -(-self._block // _LANES)
        self._size = self.num_blocks * self._block

    def flatten(self, params: PyTree) -> Array:
        """Leaves that every device has -> [N]."""
        leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(params)]
        flat = jnp.concatenate(leaves)
        return self._part_of(sharding.shared(flat) if self._shares > 1 else flat)

    def unflatten(self, flat: Array) -> PyTree:
        """[..., N] -> leaves [..., *shape], on every device."""
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        parts = jnp.split(self._whole(flat), ends[:-1], axis=-1)
        pairs = zip(parts, self._shapes, strict=True)
        leaves = [part.reshape(*flat.shape[:-1], *shape) for part, shape in pairs]
        return jax.tree.unflatten(self._treedef, leaves)

    def flatten_state(self, rule_state: PyTree) -> PyTree:
        """The rule's state for the parameters -> that for the vector."""
        return self._of_state(self._part_of, rule_state)

    def unflatten_state(self, rule_state: PyTree) -> PyTree:
        """The inverse of `flatten_state`."""
        return self._of_state(self._whole, rule_state)

    def block_of(self, index: Array, x: Array) -> Array:
        """[..., N] -> [..., N / blocks]."""
        if self.num_blocks == 1:
            return x
        start = index * self._block
        return lax.dynamic_slice_in_dim(x, start, self._block, x.ndim - 1)

    def block_of_state(self, index: Array, rule_state: PyTree) -> PyTree:
        """A block's state; what is no coordinate's own belongs to every block."""
        take = functools.partial(self.block_of, index)
        return self._of_state(take, rule_state)

    def _of_state(self, fn: Callable, rule_state: PyTree) -> PyTree:
        pick = lambda own, leaf: fn(leaf) if own else leaf  # noqa: E731
        return jax.tree.map(pick, self._own, rule_state)

    def _part_of(self, x: Array) -> Array:
        """[..., of all] -> [..., N]"""
        padding = self._shares * self._size - self._total
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        if self._shares == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self._start(), self._size, x.ndim - 1)

    def _whole(self, x: Array) -> Array:
        """[..., N] -> [..., of all], with the derivative of this device's part."""
        if self._shares > 1:
            placed = jnp.zeros((*x.shape[:-1], self._shares * self._size), x.dtype)
            placed = lax.dynamic_update_slice_in_dim(placed, x, self._start(), -1)
            x = with_gradient(sharding.gather(lax.stop_gradient(x)), placed)
        return x[..., : self._total]

    def _start(self) -> Array:
        return lax.axis_index(sharding.COORDINATE) * self._size


class Recorded(NamedTuple):
    """What the loop kept of its steps: what each began with."""

    grads: Array  # [T, N]
    losses: Array  # [T], or [T, K] of K stacked problems
    cut: Array  # bool [T], whether the derivative is cut before this step
    carry: PyTree | None  # (theta [T, N], the rule's states), where they are kept


def keeps_states(rule_state: PyTree, num_steps: int, memory: Memory) -> bool:
    """Whether the loop should keep theta and the rule's states of all its steps."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rule_state))
    return memory != "segments" and num_steps * size <= _MOST_BYTES


def per_coordinate(tx, params: PyTree, rule_state: PyTree) -> PyTree | None:
    """For each leaf of a rule's state, whether its last axis is the coordinates'.

    None where they cannot be cut into blocks: the parameters differ in dtype, or the
    state for the vector of all of them would not look like ``rule_state``.
    """
    leaves, treedef = jax.tree.flatten(rule_state)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1:
        return None
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    flat, longer = (
        jax.eval_shape(tx.init, jax.ShapeDtypeStruct((n,), *dtypes))
        for n in (total, total + 1)
    )
    if {treedef} != {jax.tree.structure(flat), jax.tree.structure(longer)}:
        return None
    shapes = [jnp.shape(leaf) for leaf in leaves]
    same, other = ([x.shape for x in jax.tree.leaves(tree)] for tree in (flat, longer))
    separates = shapes == same and all(
        a[:-1] == b[:-1] for a, b in zip(same, other, strict=True)
    )
    if not separates:
        return None
    own = [a != b for a, b in zip(same, other, strict=True)]
    return jax.tree.unflatten(treedef, own)


def replay_rule(
    tx: optax.GradientTransformationExtraArgs,
    coordinates: Coordinates,
    theta: Array,
    given: PyTree,
    recorded: Recorded,
    memory: Memory,
) -> tuple[Array, Array]:
    """Return what has the derivatives of theta_T [N], and of g_t . theta_t [T, N].

    Args:
      theta: [N], theta_0.
      given: the rule's state at the start, a constant; None: a fresh one.
      memory: what a block's scan keeps, where ``recorded`` has not the states.
    """

    def whole(theta, given, recorded):
        return _replay(tx, coordinates, theta, given, recorded, memory)

    if sharding.coordinate_devices() == 1:
        return whole(theta, given, recorded)
    # every device has the rule's parameters, and its own coordinates' part of theirs
    pure, weights = jax.closure_convert(whole, theta, given, recorded)
    return pure(theta, given, recorded, *map(sharding.shared, weights))


def _replay(tx, coordinates, theta, given, recorded, memory):
    steps = jnp.arange(recorded.losses.shape[0])

    def one_block(block, theta_block):
        take = functools.partial(coordinates.block_of, block)
        take_state = functools.partial(coordinates.block_of_state, block)

        def step(carry, xs):
            t, loss, here = xs
            grads, began = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, t, keepdims=False),
                (recorded.grads, recorded.carry),
            )
            if began is not None:
                began = (take(began[0]), take_state(began[1]))
                carry = with_gradient(began, carry)
            theta, rule_state = cut(carry, here)
            g = take(grads)
            updates, rule_state = tx.update(g, rule_state, theta, value=loss)
            return (optax.apply_updates(theta, updates), rule_state), g * theta

        start = tx.init(theta_block) if given is None else take_state(given)
        xs = (steps, recorded.losses, recorded.cut)
        (theta_block, _), products = scan(step, (theta_block, start), xs, kept)
        return theta_block, products

    kept: Memory = memory if recorded.carry is None else "remat"
    of_block = jax.checkpoint(one_block) if recorded.carry is None else one_block
    blocks = jnp.arange(coordinates.num_blocks)
    theta = theta.reshape(coordinates.num_blocks, -1)
    theta, products = lax.map(lambda xs: of_block(*xs), (blocks, theta))
    products = jnp.moveaxis(products, 0, 1)
    return theta.reshape(-1), products.reshape(len(steps), -1)
