"""The one inner loop: T updates of a learner by a bound rule, on one task.

How to differentiate is an argument of the loop, never a line inside a rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from metalstm import mixed_mode
from metalstm.base import Array, PyTree

__all__ = ["InnerState", "Memory", "Trace", "unroll"]

Memory = Literal["plain", "remat", "mixed", "segments"]
"""What `unroll` keeps of its steps for the way back; see docs/memory.md.

``plain``: all that they computed. ``remat``: theta_t and the rule's state; each step is
computed again. ``mixed``: these and the gradients; of a step only the rule is computed
again, and the derivative of its gradient is taken forward over reverse
(`metalstm.mixed_mode`), which stores nothing of the learner. ``segments``: the state at
the start of every segment of about sqrt(T) steps; each segment is computed again, as
``mixed``.
"""

_KEPT = "inner gradient"  # what "mixed" keeps beside the states

_BLOCK = 8192  # coordinates: smaller blocks stay in cache but leave a second core idle
_LANES = 16  # a block is a multiple of the vector registers' float32s


class InnerState(NamedTuple):
    params: PyTree
    stats: PyTree
    rule_state: PyTree


class Trace(NamedTuple):
    losses: Array  # [num_steps], losses[t] is the loss before update t
    observed: PyTree  # what observe= returned, stacked: leading [num_steps]


def unroll(
    loss_fn: Callable[..., tuple[Array, PyTree]],
    tx: optax.GradientTransformationExtraArgs,
    state: InnerState,
    batches: PyTree | None = None,
    *,
    num_steps: int,
    second_order: bool,
    truncate_every: int | None = None,
    memory: Memory = "plain",
    coordinatewise: bool = False,
    observe: Callable[[InnerState], PyTree] | None = None,
    key: Array | None = None,
    scan_unroll: int = 1,
) -> tuple[InnerState, Trace]:
    """Apply ``num_steps`` updates of the transform ``tx`` to one task.

    theta_{t+1} = theta_t + tx(grad loss(theta_t)). The caller vmaps over tasks.

    Args:
      loss_fn: ``(params, stats, batch, key) -> (loss, stats)``. The loss is a scalar;
        or the losses [K] of K problems that are stacked along the leading axis of every
        leaf of ``params``, for a rule that is coordinate-wise and reads no loss.
      tx: a bound rule; it is given ``params`` and the keyword ``value`` (the loss).
      state: where to start; ``rule_state=None`` stands for ``tx.init(params)``.
      batches: leading [num_steps], or None when ``loss_fn`` closes over its data (then
        it is called with ``batch=None``).
      num_steps: T, the number of updates.
      second_order: differentiate through the inner gradients. When False the gradient,
        ``value`` and the statistics are constants to the outer derivative; theta and
        the rule's state are not, and ``Trace.losses`` keeps its exact first derivative
        with respect to theta_t.
      truncate_every: cut params, statistics and rule state from the outer derivative
        before every k-th update (truncated back-propagation through time).
      memory: how much to keep for the backward pass, and how much to compute again;
        see `Memory`. It changes no value. In second order ``mixed`` and ``segments``
        have no `jax.jvp` (but one of their gradient).
      coordinatewise: the promise of `UpdateRule.coordinatewise`. Together with
        ``second_order=False`` the derivative of theta_T is taken through a replay of
        the rule over blocks of coordinates, which stays in cache; values do not
        change. A given and the final rule state are then constants.
      observe: diagnostics of the state after each update, for ``Trace.observed``.
      key: a PRNG key; step t gets ``fold_in(key, t)``. None: ``loss_fn`` gets None.
      scan_unroll: iterations per trip of the `lax.scan`; on CPU a few steps run faster
        as straight-line code.

    Raises:
      ValueError: ``num_steps`` or ``truncate_every`` is not positive, ``memory`` is not
        a choice, or ``batches`` does not lead with ``num_steps``.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: choose at least 1")
    if truncate_every is not None and truncate_every < 1:
        raise ValueError(f"truncate_every={truncate_every}: choose at least 1, or None")
    if memory not in get_args(Memory):
        choices = ", ".join(get_args(Memory))
        raise ValueError(f"memory={memory!r}: choose one of {choices}")
    for leaf in jax.tree.leaves(batches):
        if leaf.shape[:1] != (num_steps,):
            raise ValueError(
                f"batches has a leaf of shape {leaf.shape} but num_steps={num_steps}: "
                "stack one batch for each step along the leading axis"
            )

    blocked = constant_states = coordinatewise and not second_order
    given = state.rule_state
    if given is None:
        state = state._replace(rule_state=tx.init(state.params))
    elif constant_states:
        state = state._replace(rule_state=lax.stop_gradient(given))
        # a state shaped like the tree of parameters cannot be cut into blocks
        blocked = _per_coordinate(tx, state.params, given) is not None
    loop_update = _without_derivative(tx) if blocked else tx.update
    cut_before = _cut_steps(num_steps, truncate_every)

    mixed = second_order and memory in ("mixed", "segments")
    gradient = mixed_mode.value_and_gradient if mixed else _value_and_gradient

    def step(carry: InnerState, xs):
        t, cut, batch = xs
        step_key = None if key is None else jax.random.fold_in(key, t)
        if truncate_every is not None:
            carry = _cut(carry, cut)
        at = carry if second_order else jax.tree.map(lax.stop_gradient, carry)
        loss, stats, grads = gradient(loss_fn, at.params, at.stats, batch, step_key)
        loss, grads = checkpoint_name((loss, grads), _KEPT)
        if not second_order:
            loss, stats, grads = jax.tree.map(lax.stop_gradient, (loss, stats, grads))
        updates, rule_state = loop_update(
            grads, carry.rule_state, carry.params, value=loss
        )
        new = InnerState(optax.apply_updates(carry.params, updates), stats, rule_state)
        if not second_order and not blocked:
            first_order = _products(grads, carry.params, jnp.shape(loss))
            loss = _with_gradient(loss, first_order)
        observed = () if observe is None else observe(new)
        return new, (loss, observed, grads if blocked else ())

    xs = (jnp.arange(num_steps), cut_before, batches)
    # replayed, the loop itself has no way back
    start = jax.tree.map(lax.stop_gradient, state) if blocked else state
    kept: Memory = "plain" if blocked else memory
    final, (losses, observed, grads) = _scan(step, start, xs, kept, scan_unroll)
    if constant_states:
        final = final._replace(rule_state=lax.stop_gradient(final.rule_state))
    if blocked:
        params, first_order = _replay(
            tx, state.params, given, grads, losses, cut_before, memory
        )
        final = final._replace(params=_with_gradient(final.params, params))
        losses = _with_gradient(losses, first_order)
    return final, Trace(losses, observed)


def _value_and_gradient(loss_fn: Callable, *args):
    def total(*args):
        loss, stats = loss_fn(*args)
        return jnp.sum(loss), (loss, stats)

    (_, (loss, stats)), grads = jax.value_and_grad(total, has_aux=True)(*args)
    return loss, stats, grads


def _scan(step: Callable, start: PyTree, xs: PyTree, memory: Memory, unroll: int = 1):
    """`lax.scan`, which keeps for the way back what ``memory`` says."""
    length = jax.tree.leaves(xs)[0].shape[0]
    if memory == "plain":
        return lax.scan(step, start, xs, unroll=unroll)
    policies = jax.checkpoint_policies
    keep = None if memory == "remat" else policies.save_only_these_names(_KEPT)
    # a loop computes again by itself; of straight-line code XLA would merge both times
    step = jax.checkpoint(step, prevent_cse=unroll > 1, policy=keep)
    steps = functools.partial(lax.scan, step, unroll=unroll)
    if memory != "segments":
        return steps(start, xs)

    segment = _segment_length(length)
    whole = length - length % segment
    if whole == length:
        first, rest = xs, None
    else:  # a part of an array is a copy of it
        first = jax.tree.map(lambda x: x[:whole], xs)
        rest = jax.tree.map(lambda x: x[whole:], xs)
    first = jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), first)
    state, out = lax.scan(jax.checkpoint(steps, prevent_cse=False), start, first)
    out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
    if rest is not None:
        state, last = steps(state, rest)
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, last)
    return state, out


def _segment_length(num_steps: int) -> int:
    """About sqrt(T), if possible a divisor: T / k + k states are then the fewest."""
    root = math.isqrt(num_steps - 1) + 1
    return next((k for k in range(root, 2 * root) if num_steps % k == 0), root)


def _cut_steps(num_steps: int, truncate_every: int | None) -> Array:
    steps = jnp.arange(num_steps)
    if truncate_every is None:
        return jnp.zeros(num_steps, bool)
    return (steps % truncate_every == 0) & (steps > 0)


def _cut(state: PyTree, cut: Array) -> PyTree:
    return jax.tree.map(lambda x: jnp.where(cut, lax.stop_gradient(x), x), state)


def _products(grads: PyTree, params: PyTree, shape: tuple[int, ...]) -> Array:
    """g . theta, for the loss's ``shape``: its derivative by theta is that of the loss.

    () is one sum over everything, [K] one for each problem.
    """
    terms = jax.tree.map(
        lambda g, p: (g * p.astype(g.dtype)).reshape(*shape, -1).sum(-1), grads, params
    )
    return sum(jax.tree.leaves(terms), jnp.float32(0))


@jax.custom_jvp
def _with_gradient(values: PyTree, of: PyTree) -> PyTree:
    """``values``, with the derivative of ``of``, whose value nobody then computes."""
    del of
    return values


@_with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    like = lambda value, tangent: tangent.astype(value.dtype)  # noqa: E731
    # the function itself, for the derivatives of the derivative
    return _with_gradient(*primals), jax.tree.map(like, primals[0], tangents[1])


def _without_derivative(tx) -> Callable:
    """``tx.update`` with the arrays it closes over (the rule's parameters) constant."""

    def update(grads, rule_state, params, value):
        pure, closed_over = jax.closure_convert(
            lambda g, s, p, v: tx.update(g, s, p, value=v),
            grads,
            rule_state,
            params,
            value,
        )
        constants = [lax.stop_gradient(x) for x in closed_over]
        return pure(grads, rule_state, params, value, *constants)

    return update


def _per_coordinate(tx, params: PyTree, rule_state: PyTree) -> list[bool] | None:
    """For each leaf of a rule's state, whether its last axis is the coordinates'.

    None where that is not the whole answer: the state of the flat vector of all
    parameters would not look like ``rule_state``.
    """
    leaves = jax.tree.leaves(params)
    total = sum(leaf.size for leaf in leaves)
    dtype = jnp.result_type(*leaves)
    flat, longer = (
        jax.eval_shape(tx.init, jax.ShapeDtypeStruct((n,), dtype))
        for n in (total, total + 1)
    )
    trees = (rule_state, flat, longer)
    if len({jax.tree.structure(tree) for tree in trees}) > 1:
        return None
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees]
    separates = all(
        shape == same and shape[:-1] == other[:-1]
        for shape, same, other in zip(*shapes, strict=True)
    )
    if not separates:
        return None
    return [same != other for same, other in zip(*shapes[1:], strict=True)]


def _replay(
    tx,
    params: PyTree,
    given: PyTree,
    grads: PyTree,
    losses: Array,
    cut_before: Array,
    memory: Memory,
):
    """Run the rule alone over recorded gradients and losses, block by block.

    With gradients and losses held constant a coordinate-wise rule separates over
    coordinates, so each block of them is replayed, and later differentiated, by itself.
    ``given`` is the rule's state at the start, a constant; None: a fresh one.

    Returns theta_T, and what has the derivatives of ``losses``.
    """
    leaves, treedef = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]
    total = sum(sizes)
    num_blocks = -(-total // _BLOCK)
    block = _LANES * -(-total // (_LANES * num_blocks))

    def to_blocks(flat):  # [..., total] -> [num_blocks, ..., block]
        padding = num_blocks * block - total
        flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
        flat = flat.reshape(*flat.shape[:-1], num_blocks, block)
        return jnp.moveaxis(flat, -2, 0)

    def from_blocks(blocks):  # its inverse, as a list of leaves [..., *leaf's shape]
        flat = jnp.moveaxis(blocks, 0, -2)
        lead = flat.shape[:-2]
        parts = jnp.split(
            flat.reshape(*lead, -1)[..., :total], np.cumsum(sizes)[:-1], axis=-1
        )
        return [
            part.reshape(*lead, *leaf.shape)
            for part, leaf in zip(parts, leaves, strict=True)
        ]

    theta = to_blocks(jnp.concatenate([x.reshape(-1) for x in leaves]))
    steps = losses.shape[0]
    grad = to_blocks(
        jnp.concatenate([g.reshape(steps, -1) for g in jax.tree.leaves(grads)], axis=1)
    )

    given_leaves, state_treedef = jax.tree.flatten(lax.stop_gradient(given))
    sliced = _per_coordinate(tx, params, given) or []
    given_blocks = [
        to_blocks(leaf) for leaf, own in zip(given_leaves, sliced, strict=True) if own
    ]

    def start_of(theta_block, given_block):
        if given is None:
            return tx.init(theta_block)
        own = iter(given_block)
        state = [
            next(own) if mine else leaf
            for leaf, mine in zip(given_leaves, sliced, strict=True)
        ]
        return jax.tree.unflatten(state_treedef, state)

    @jax.checkpoint
    def one_block(theta_block, given_block, grad_block):
        def step(carry, xs):
            g, loss, cut = xs
            theta, rule_state = _cut(carry, cut)
            product = g * theta
            updates, rule_state = tx.update(g, rule_state, theta, value=loss)
            return (optax.apply_updates(theta, updates), rule_state), product

        start = (theta_block, start_of(theta_block, given_block))
        (theta_block, _), products = _scan(
            step, start, (grad_block, losses, cut_before), memory
        )
        return theta_block, products

    blocks, products = lax.map(lambda xs: one_block(*xs), (theta, given_blocks, grad))
    of_losses = sum(
        part.reshape(*losses.shape, -1).sum(-1) for part in from_blocks(products)
    )
    out = [
        x.astype(leaf.dtype)
        for x, leaf in zip(from_blocks(blocks), leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, out), of_losses
