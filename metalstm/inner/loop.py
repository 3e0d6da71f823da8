"""The one inner loop: T updates of a learner by a rule, on one task.

How to differentiate is an argument of the loop, never a line inside a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least
from metalstm.inner import mixed_mode
from metalstm.inner.coordinatewise import (
    Coordinates,
    Recorded,
    keeps_states,
    replay_rule,
)
from metalstm.inner.differentiation import Differentiation, Keep
from metalstm.inner.scanning import (
    INNER_GRADIENT,
    concatenate,
    scaled,
    scan,
    stop_gradient_where,
    with_gradient,
)
from metalstm.rules.classic import as_rule
from metalstm.rules.flat import per_coordinate_leaves

__all__ = ["InnerState", "Trace", "unroll"]


class InnerState(NamedTuple):
    params: PyTree
    stats: PyTree
    rule_state: PyTree


class Trace(NamedTuple):
    losses: Array  # [num_steps], losses[t] is the loss before update t
    observed: PyTree  # what observe= returned, stacked: leading [num_steps]


class _Steps(NamedTuple):
    """What a scan over the updates reads; every leaf leads with [num_steps]."""

    t: Array  # int32
    truncates: Array  # bool, whether the derivative is cut before this step
    batch: PyTree


def unroll(
    loss_fn: Callable[..., tuple[Array, PyTree]],
    rule: UpdateRule | optax.GradientTransformation,
    rule_params: PyTree,
    params: PyTree,
    batches: PyTree | None = None,
    *,
    num_steps: int,
    differentiation: Differentiation,
    stats: PyTree = (),
    rule_state: PyTree | None = None,
    gradient_scale: Array | float = 1.0,
    observe: Callable[[InnerState], PyTree] | None = None,
    key: Array | None = None,
    axis_name: str | None = None,
    scan_unroll: int = 1,
) -> tuple[InnerState, Trace]:
    """Apply ``num_steps`` updates of a rule to one task.

    theta_{t+1} = theta_t + rule(grad loss(theta_t)). The caller vmaps over tasks.

    In first order a rule that promises to be coordinate-wise is differentiated alone,
    in blocks of coordinates, which stays in cache (`coordinatewise`): values change by
    rounding alone, and its state, given or returned, is a constant.

    Args:
      loss_fn: ``(params, stats, batch, key) -> (loss, stats)``. The loss is a scalar;
        or the losses [K] of K problems, the k-th being the k-th of K equal parts of
        every leaf of ``params``, for a rule that is coordinate-wise and reads no loss.
      rule: an `UpdateRule`, or an optax transform (then ``rule_params`` is ``()``).
      rule_params: the rule's parameters, as ``rule.init`` gives them.
      params: theta_0.
      batches: leading [num_steps], or None when ``loss_fn`` closes over its data (then
        it is called with ``batch=None``).
      num_steps: T, the number of updates.
      differentiation: `first_order` or `second_order`: what the outer derivative goes
        through, and what is stored for it. It changes no value.
      stats: what ``loss_fn`` carries from step to step, such as batch statistics.
      rule_state: where the rule continues from; None: ``init`` of the bound rule.
      gradient_scale: what the gradient is multiplied by before the rule sees it.
      observe: diagnostics of the state after each update, for ``Trace.observed``.
      key: a PRNG key; step t gets ``fold_in(key, t)``. None: ``loss_fn`` gets None.
      axis_name: a mesh axis (inside `jax.shard_map`) whose devices share the work of a
        coordinate-wise rule in first order; each computes the learner's gradients.
      scan_unroll: iterations per trip of the `lax.scan`; on CPU a few steps run faster
        as straight-line code.

    Returns:
      The state after the last update, and the `Trace` of all of them.

    Raises:
      ValueError: ``num_steps`` is below 1, ``batches`` does not lead with it, or the
        loss is a vector that the rule would mix.
    """
    check_at_least("num_steps", num_steps, 1)
    _check_batches(batches, num_steps)
    rule = as_rule(rule)
    gradient = _gradient_fn(loss_fn, differentiation, key, rule.traits)
    steps = _Steps(
        jnp.arange(num_steps),
        _truncation_points(num_steps, differentiation.truncate_every),
        batches,
    )
    constant_state = rule.traits.coordinatewise and differentiation.order == "first"
    if constant_state:
        rule_state = lax.stop_gradient(rule_state)
        tx = rule.bind(lax.stop_gradient(rule_params))
        per_coordinate = per_coordinate_leaves(tx.init, params)
        if per_coordinate is not None:
            final, trace = _in_blocks(
                gradient,
                rule,
                rule_params,
                InnerState(params, stats, rule_state),
                steps,
                Coordinates(params, per_coordinate, axis_name),
                gradient_scale=gradient_scale,
                keep=differentiation.keep,
                observe=observe,
                axis_name=axis_name,
                scan_unroll=scan_unroll,
            )
            return final, trace

    tx = rule.bind(rule_params)
    if rule_state is None:
        rule_state = tx.init(params)
    final, trace = _plain(
        gradient,
        tx,
        InnerState(params, stats, rule_state),
        steps,
        differentiation,
        gradient_scale=gradient_scale,
        observe=observe,
        scan_unroll=scan_unroll,
    )
    if constant_state:  # like that of the blocks, whatever the parameters are
        final = final._replace(rule_state=lax.stop_gradient(final.rule_state))
    return final, trace


def _plain(
    gradient: Callable,
    tx: optax.GradientTransformationExtraArgs,
    start: InnerState,
    steps: _Steps,
    differentiation: Differentiation,
    *,
    gradient_scale: Array | float,
    observe: Callable[[InnerState], PyTree] | None,
    scan_unroll: int,
) -> tuple[InnerState, Trace]:
    """Differentiate the scan as JAX does."""

    def make_step(is_second: bool):
        def step(carry: InnerState, xs: _Steps):
            if differentiation.truncate_every is not None:
                carry = stop_gradient_where(xs.truncates, carry)
            loss, stats, grads = gradient(
                xs.t, carry.params, carry.stats, xs.batch, is_second=is_second
            )
            loss, grads = checkpoint_name((loss, grads), INNER_GRADIENT)
            updates, rule_state = tx.update(
                scaled(grads, gradient_scale),
                carry.rule_state,
                carry.params,
                value=loss,
            )
            params = optax.apply_updates(carry.params, updates)
            new = InnerState(params, stats, rule_state)
            if not is_second:
                product = _products(grads, carry.params, jnp.shape(loss))
                loss = with_gradient(loss, product)
            return new, (loss, () if observe is None else observe(new))

        return step

    num_steps = len(steps.t)
    # in the first of these steps the gradient is a constant, in the others it is not
    num_first = num_steps if differentiation.order == "first" else 0
    if differentiation.last is not None:
        num_first = max(num_steps - differentiation.last, 0)
    outs = []
    for is_second, part in ((False, slice(num_first)), (True, slice(num_first, None))):
        length = len(range(num_steps)[part])
        if length:
            xs = steps
            if length < num_steps:
                xs = jax.tree.map(lambda x: x[part], steps)  # noqa: B023 (used at once)
            start, out = scan(
                make_step(is_second), start, xs, differentiation.keep, scan_unroll
            )
            outs.append(out)
    losses, observed = outs[0] if len(outs) == 1 else concatenate(*outs)
    return start, Trace(losses, observed)


def _in_blocks(
    gradient: Callable,
    rule: UpdateRule,
    rule_params: PyTree,
    start: InnerState,
    steps: _Steps,
    coordinates: Coordinates,
    *,
    gradient_scale: Array | float,
    keep: Keep,
    observe: Callable[[InnerState], PyTree] | None,
    axis_name: str | None,
    scan_unroll: int,
) -> tuple[InnerState, Trace]:
    """Unroll a coordinate-wise rule in first order: see `coordinatewise.py`.

    The scan works on the vector of all coordinates and has no derivative. What it gives
    out gets the derivative of the rule's replay over what it recorded.
    """
    # the replay binds the rule to its parameters, the scan to constants
    tx = rule.bind(lax.stop_gradient(rule_params))

    def as_trees(state: InnerState) -> InnerState:
        return InnerState(
            coordinates.unflatten(state.params),
            state.stats,
            coordinates.unflatten_state(state.rule_state),
        )

    def step(carry: InnerState, xs: _Steps):
        params = coordinates.unflatten(carry.params)
        loss, stats, grads = gradient(
            xs.t, params, carry.stats, xs.batch, is_second=False
        )
        grads = coordinates.flatten(grads)
        updates, rule_state = tx.update(
            scaled(grads, gradient_scale), carry.rule_state, carry.params, value=loss
        )
        new = InnerState(optax.apply_updates(carry.params, updates), stats, rule_state)
        before = (carry.params, carry.rule_state) if records_states else None
        observed = () if observe is None else observe(as_trees(new))
        return new, (loss, observed, grads, before)

    theta = coordinates.flatten(start.params)
    state = start.rule_state
    if state is not None:
        state = coordinates.flatten_state(state)
    carry = InnerState(theta, start.stats, tx.init(theta) if state is None else state)
    records_states = keeps_states(carry.rule_state, len(steps.t), keep)
    final, (losses, observed, grads, before) = lax.scan(
        step, lax.stop_gradient(carry), steps, unroll=scan_unroll
    )
    final = as_trees(final)
    theta, products = replay_rule(
        rule,
        rule_params,
        coordinates,
        theta,
        state,
        Recorded(grads, losses, steps.truncates, before),
        gradient_scale=gradient_scale,
        keep=keep,
        axis_name=axis_name,
    )
    # the derivative of g . theta by theta is that of the loss
    parts = jax.tree.leaves(coordinates.unflatten(products))
    of_losses = sum(part.reshape(*losses.shape, -1).sum(-1) for part in parts)
    final = InnerState(
        with_gradient(final.params, coordinates.unflatten(theta)),
        final.stats,
        lax.stop_gradient(final.rule_state),
    )
    return final, Trace(with_gradient(losses, of_losses), observed)


def _gradient_fn(
    loss_fn: Callable,
    differentiation: Differentiation,
    key: Array | None,
    traits: RuleTraits,
) -> Callable:
    """``(t, params, stats, batch, is_second) -> (loss, stats, gradient)``."""
    separates = traits.coordinatewise and not traits.reads_loss
    mixed = differentiation.keep in ("mixed", "segments")
    through = mixed_mode.value_and_gradient if mixed else _value_and_gradient

    def gradient(t: Array, params, stats, batch, *, is_second: bool):
        step_key = None if key is None else jax.random.fold_in(key, t)
        args = (params, stats, batch, step_key)
        if is_second:
            found = through(loss_fn, *args)
        else:
            args = (*lax.stop_gradient((params, stats)), batch, step_key)
            found = lax.stop_gradient(_value_and_gradient(loss_fn, *args))
        if jnp.ndim(found[0]) and not separates:
            raise ValueError(
                f"loss_fn returned losses of shape {jnp.shape(found[0])}: return one "
                "scalar, such as their mean; several problems in one need a rule that "
                "is coordinate-wise and reads no loss"
            )
        return found

    return gradient


def _value_and_gradient(loss_fn: Callable, *args):
    def total(*args):
        loss, stats = loss_fn(*args)
        return jnp.sum(loss), (loss, stats)

    (_, (loss, stats)), grads = jax.value_and_grad(total, has_aux=True)(*args)
    return loss, stats, grads


def _products(grads: PyTree, params: PyTree, shape: tuple[int, ...]) -> Array:
    """g . theta, whose derivative by theta is that of the loss, in the loss's shape."""
    terms = jax.tree.map(
        lambda g, p: (g * p.astype(g.dtype)).reshape(*shape, -1).sum(-1), grads, params
    )
    return sum(jax.tree.leaves(terms), jnp.float32(0))


def _truncation_points(num_steps: int, truncate_every: int | None) -> Array:
    steps = jnp.arange(num_steps)
    if truncate_every is None:
        return jnp.zeros(num_steps, bool)
    return (steps % truncate_every == 0) & (steps > 0)


def _check_batches(batches: PyTree, num_steps: int) -> None:
    for leaf in jax.tree.leaves(batches):
        if leaf.shape[:1] != (num_steps,):
            raise ValueError(
                f"batches has a leaf of shape {leaf.shape} but num_steps={num_steps}: "
                "stack one batch for each step along the leading axis"
            )
