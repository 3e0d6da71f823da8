"""The one inner loop: T updates of a learner by a bound rule, on one task.

How to differentiate is an argument of the loop, never a line inside a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from metalstm.base import Array, PyTree
from metalstm.inner import mixed_mode
from metalstm.inner.coordinatewise import (
    Coordinates,
    Recorded,
    keeps_states,
    per_coordinate,
    replay_rule,
)
from metalstm.inner.scanning import KEPT, Memory, cut, scan, with_gradient

__all__ = ["InnerState", "Memory", "Trace", "unroll"]


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
        ``second_order=False`` the derivative of theta_T is taken through the rule
        alone, over blocks of coordinates, which stays in cache (`coordinatewise`);
        values change by rounding alone. A given and the final rule state are then
        constants.
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

    mixed = second_order and memory in ("mixed", "segments")
    derivative = mixed_mode.value_and_gradient if mixed else _value_and_gradient

    def gradient(t: Array, params: PyTree, stats: PyTree, batch: PyTree):
        step_key = None if key is None else jax.random.fold_in(key, t)
        if second_order:
            return derivative(loss_fn, params, stats, batch, step_key)
        params, stats = lax.stop_gradient((params, stats))
        return lax.stop_gradient(derivative(loss_fn, params, stats, batch, step_key))

    fresh = state.rule_state is None
    if fresh:
        state = state._replace(rule_state=tx.init(state.params))
    elif coordinatewise and not second_order:
        state = state._replace(rule_state=lax.stop_gradient(state.rule_state))
    xs = (jnp.arange(num_steps), _cut_steps(num_steps, truncate_every), batches)
    if coordinatewise and not second_order:
        own = per_coordinate(tx, state.params, state.rule_state)
        if own is not None:
            return _in_blocks(
                gradient, tx, state, fresh, xs, own, memory, observe, scan_unroll
            )

    def step(carry: InnerState, xs):
        t, here, batch = xs
        if truncate_every is not None:
            carry = cut(carry, here)
        loss, stats, grads = gradient(t, carry.params, carry.stats, batch)
        loss, grads = checkpoint_name((loss, grads), KEPT)
        updates, rule_state = tx.update(
            grads, carry.rule_state, carry.params, value=loss
        )
        new = InnerState(optax.apply_updates(carry.params, updates), stats, rule_state)
        if not second_order:
            first_order = _products(grads, carry.params, jnp.shape(loss))
            loss = with_gradient(loss, first_order)
        return new, (loss, () if observe is None else observe(new))

    final, (losses, observed) = scan(step, state, xs, memory, scan_unroll)
    if coordinatewise and not second_order:
        final = final._replace(rule_state=lax.stop_gradient(final.rule_state))
    return final, Trace(losses, observed)


def _in_blocks(
    gradient: Callable,
    tx: optax.GradientTransformationExtraArgs,
    state: InnerState,
    fresh: bool,
    xs: PyTree,
    own: PyTree,
    memory: Memory,
    observe: Callable[[InnerState], PyTree] | None,
    scan_unroll: int,
) -> tuple[InnerState, Trace]:
    """`unroll` of a coordinate-wise rule in first order: see `coordinatewise.py`.

    The loop works on the vector of all coordinates, and has no way back itself.
    """
    coordinates = Coordinates(state.params, own)
    update = _without_derivative(tx)

    def whole(carry: InnerState) -> InnerState:
        params = coordinates.unflatten(carry.params)
        return InnerState(
            params, carry.stats, coordinates.unflatten_state(carry.rule_state)
        )

    def step(carry: InnerState, xs):
        t, _, batch = xs
        params = coordinates.unflatten(carry.params)
        loss, stats, grads = gradient(t, params, carry.stats, batch)
        grads = coordinates.flatten(grads)
        updates, rule_state = update(grads, carry.rule_state, carry.params, loss)
        new = InnerState(optax.apply_updates(carry.params, updates), stats, rule_state)
        began = (carry.params, carry.rule_state) if keeps else None
        observed = () if observe is None else observe(whole(new))
        return new, (loss, observed, grads, began)

    theta = coordinates.flatten(state.params)
    given = None if fresh else coordinates.flatten_state(state.rule_state)
    start = InnerState(theta, state.stats, tx.init(theta) if fresh else given)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    keeps = keeps_states(start.rule_state, num_steps, memory)
    start = lax.stop_gradient(start)
    final, (losses, observed, grads, began) = lax.scan(
        step, start, xs, unroll=scan_unroll
    )
    final = whole(final)
    recorded = Recorded(grads, losses, xs[1], began)
    theta, products = replay_rule(tx, coordinates, theta, given, recorded, memory)
    # g . theta, for the loss's shape: its derivative by theta is that of the loss
    first_order = sum(
        part.reshape(*losses.shape, -1).sum(-1)
        for part in jax.tree.leaves(coordinates.unflatten(products))
    )
    params = with_gradient(final.params, coordinates.unflatten(theta))
    return final._replace(params=params), Trace(
        with_gradient(losses, first_order), observed
    )


def _value_and_gradient(loss_fn: Callable, *args):
    def total(*args):
        loss, stats = loss_fn(*args)
        return jnp.sum(loss), (loss, stats)

    (_, (loss, stats)), grads = jax.value_and_grad(total, has_aux=True)(*args)
    return loss, stats, grads


def _cut_steps(num_steps: int, truncate_every: int | None) -> Array:
    steps = jnp.arange(num_steps)
    if truncate_every is None:
        return jnp.zeros(num_steps, bool)
    return (steps % truncate_every == 0) & (steps > 0)


def _products(grads: PyTree, params: PyTree, shape: tuple[int, ...]) -> Array:
    """g . theta, for the loss's ``shape``: its derivative by theta is that of the loss.

    () is one sum over everything, [K] one for each problem.
    """
    terms = jax.tree.map(
        lambda g, p: (g * p.astype(g.dtype)).reshape(*shape, -1).sum(-1), grads, params
    )
    return sum(jax.tree.leaves(terms), jnp.float32(0))


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
