"""The first-order derivative of a coordinate-wise rule, block by block of coordinates.

With gradients and losses constant, such a rule separates over coordinates. So the inner
loop runs without a derivative and records what went into the rule; here the rule alone
runs over the record again, and is differentiated, on one block of coordinates at a
time, which stays in cache.

Devices may share a task, along the axis ``axis_name`` of a mesh: each then has the
rule's part of the work for its share of the coordinates. theta is gathered before each
gradient, and in the backward pass only the sums for the rule's parameters and theta_0
travel.

Notation: N coordinates, this device's share of them padded to whole blocks; T steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.inner.differentiation import Keep
from metalstm.inner.scanning import (
    scaled,
    scan,
    stop_gradient_where,
    with_gradient,
)
from metalstm.rules import flat
from metalstm.runtime import sharding
from metalstm.runtime.compilation import cores_to_spare, platform

__all__ = ["Coordinates", "Recorded", "keeps_states", "replay_rule"]

# Coordinates, by whether a device has several cores: smaller blocks stay in cache but
# leave a second core idle (MNIST MLP on a core each: 6.4 meta-steps/s for 5.5).
_BLOCK = {False: 1024, True: 8192}
_LANES = 16  # a block is a multiple of the vector registers' float32s
_MOST_BYTES = 2**28  # of states that are kept: larger ones are recomputed


class Coordinates:
    """All leaves of parameters of one dtype as one vector [N], and back.

    Args:
      params: the parameters.
      per_coordinate: of the rule's state, from `rules.flat.per_coordinate_leaves`.
      axis_name: the mesh axis of the devices that share a task, or None.
    """

    def __init__(self, params: PyTree, per_coordinate: PyTree, axis_name: str | None):
        leaves = jax.tree.leaves(params)
        self._template = params
        self._dtype = jnp.result_type(leaves[0])
        self._per_coordinate = per_coordinate
        self._axis_name = axis_name
        self._total = sum(flat.leaf_sizes(params))
        self._num_devices = sharding.axis_devices(axis_name)
        share = -(-self._total // self._num_devices)
        on_one_core = platform() == "cpu" and not cores_to_spare()
        self.num_blocks = -(-share // _BLOCK[not on_one_core])
        self._block = -(-share // self.num_blocks)
        if share >= _LANES**2:  # then the padding is small
            self._block = _LANES * -(-self._block // _LANES)
        self._size = self.num_blocks * self._block

    def flatten(self, params: PyTree) -> Array:
        """Leaves that every device has -> [N]."""
        vector = flat.flatten(params, self._dtype)
        if self._axis_name is not None:
            # each device differentiates its own share: the whole is the sum of them
            vector = sharding.psum_cotangent(vector, self._axis_name)
        return self._share_of(vector)

    def unflatten(self, vector: Array) -> PyTree:
        """[..., N] -> leaves [..., *shape], on every device."""
        return flat.unflatten(self._all_of(vector), self._template)

    def flatten_state(self, rule_state: PyTree) -> PyTree:
        """The rule's state for the parameters -> that for the vector."""
        return self._map_state(self._share_of, rule_state)

    def unflatten_state(self, rule_state: PyTree) -> PyTree:
        """The inverse of `flatten_state`."""
        return self._map_state(self._all_of, rule_state)

    def block_of(self, index: Array, x: Array) -> Array:
        """[..., N] -> [..., N / blocks]."""
        if self.num_blocks == 1:
            return x
        start = index * self._block
        return lax.dynamic_slice_in_dim(x, start, self._block, x.ndim - 1)

    def block_of_state(self, index: Array, rule_state: PyTree) -> PyTree:
        """A block's state; leaves shared by all coordinates belong to every block."""
        return self._map_state(functools.partial(self.block_of, index), rule_state)

    def _map_state(self, fn: Callable, rule_state: PyTree) -> PyTree:
        pick = lambda per_coordinate, leaf: fn(leaf) if per_coordinate else leaf  # noqa: E731
        return jax.tree.map(pick, self._per_coordinate, rule_state)

    def _share_of(self, x: Array) -> Array:
        """[..., all coordinates] -> [..., N]."""
        padding = self._num_devices * self._size - self._total
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        if self._axis_name is None:
            return x
        return lax.dynamic_slice_in_dim(x, self._start(), self._size, x.ndim - 1)

    def _all_of(self, x: Array) -> Array:
        """[..., N] -> [..., all coordinates], with the derivative of this share."""
        if self._axis_name is not None:
            shape = (*x.shape[:-1], self._num_devices * self._size)
            placed = jnp.zeros(shape, x.dtype)
            placed = lax.dynamic_update_slice_in_dim(placed, x, self._start(), -1)
            gathered = sharding.gather(lax.stop_gradient(x), self._axis_name)
            x = with_gradient(gathered, placed)
        return x[..., : self._total]

    def _start(self) -> Array:
        return lax.axis_index(self._axis_name) * self._size


class Recorded(NamedTuple):
    """What the inner loop recorded of its steps, for the backward pass."""

    grads: Array  # [T, N], as the learner gave them
    losses: Array  # [T], or [T, K] of K stacked problems
    truncates: Array  # bool [T], whether the derivative is cut before this step
    states: PyTree | None  # (theta [T, N], rule states) before each step, where kept


def keeps_states(rule_state: PyTree, num_steps: int, keep: Keep) -> bool:
    """Whether the loop should record theta and the rule's states of all its steps."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rule_state))
    return keep != "segments" and num_steps * size <= _MOST_BYTES


def replay_rule(
    rule: UpdateRule,
    rule_params: PyTree,
    coordinates: Coordinates,
    theta: Array,
    rule_state: PyTree,
    recorded: Recorded,
    *,
    gradient_scale: Array | float,
    keep: Keep,
    axis_name: str | None,
) -> tuple[Array, Array]:
    """Return what has the derivatives of theta_T [N], and of g_t . theta_t [T, N].

    Args:
      theta: [N], theta_0.
      rule_state: the rule's state at the start, a constant; None: a fresh one.
      gradient_scale: what the rule saw the gradients multiplied by.
      keep: what a block's scan stores, where ``recorded`` has not the states.
    """
    if axis_name is not None:
        # every device has the rule's parameters, and a derivative from its own
        # coordinates alone: the whole is the sum of them
        rule_params = jax.tree.map(
            lambda leaf: sharding.psum_cotangent(leaf, axis_name), rule_params
        )
    tx = rule.bind(rule_params)
    steps = jnp.arange(recorded.losses.shape[0])

    def one_block(block, theta_block):
        take = functools.partial(coordinates.block_of, block)
        take_state = functools.partial(coordinates.block_of_state, block)

        def step(carry, xs):
            t, loss, truncates = xs
            # the record stays whole, and is indexed: slices of it for each block would
            # be copies
            grads, states = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, t, keepdims=False),
                (recorded.grads, recorded.states),
            )
            if states is not None:
                # the value of the carry was recorded, so that nothing computes it
                # again; its derivative is that of the update before
                states = (take(states[0]), take_state(states[1]))
                carry = with_gradient(states, carry)
            theta, rule_state = stop_gradient_where(truncates, carry)
            g = take(grads)
            updates, rule_state = tx.update(
                scaled(g, gradient_scale), rule_state, theta, value=loss
            )
            return (optax.apply_updates(theta, updates), rule_state), g * theta

        start = tx.init(theta_block) if rule_state is None else take_state(rule_state)
        xs = (steps, recorded.losses, recorded.truncates)
        (theta_block, _), products = scan(step, (theta_block, start), xs, keep_in_block)
        return theta_block, products

    # a recorded state is where each step's recomputation starts
    keep_in_block: Keep = keep if recorded.states is None else "remat"
    if recorded.states is None:
        one_block = jax.checkpoint(one_block)
    theta = theta.reshape(coordinates.num_blocks, -1)
    blocks = jnp.arange(coordinates.num_blocks)
    theta, products = lax.map(lambda xs: one_block(*xs), (blocks, theta))
    products = jnp.moveaxis(products, 0, 1)
    return theta.reshape(-1), products.reshape(len(steps), -1)
