"""Fall back to another optimizer while a rule makes the loss rise."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree

__all__ = ["FallbackState", "with_fallback"]

_FAST, _SLOW = 0.9, 0.99  # decays of the averages of the loss and of its deviation
_FORGET = 1e-4  # share by which the best level and its noise near the present ones
_WARM_UP = 5  # losses before the first test
_HALVE, _RECOVER = 0.5, 0.999  # of the trust in the rule; of what it lacks


class FallbackState(NamedTuple):
    step: Array  # int32, updates whose loss and gradient were finite
    mean: Array  # of the loss; not yet divided by the weights it has so far
    deviation: Array  # of the loss from its mean; likewise
    best: Array  # the lowest that the mean has been
    noise: Array  # the deviation at that time
    trust: Array  # share of the update that is the rule's, in [0, 1]
    rule: PyTree
    other: PyTree


def with_fallback(
    tx: optax.GradientTransformation,
    other: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Blend a rule's updates with another optimizer's where its loss rises.

    .. math:: \Delta = w \, \Delta_{rule} + (1 - w) \, \Delta_{other}

    The trust w starts at 1. It is halved at each update at which the running mean of
    the loss (decay 0.9) is above the lowest it has been by more than three times the
    loss's mean deviation from it at that time; otherwise what it lacks to 1 shrinks by
    a thousandth. A loss or gradient that is not finite changes nothing but the trust,
    which it halves: no parameter moves, and it reaches no state. An update of the rule
    that is not finite is replaced by the other's, in whose updates what is not finite
    counts as 0. A finite gradient whose square is not (1e22) still makes AdamW's second
    moment infinite for good, as without the fallback: clip gradients before it.

    Args:
      tx: the rule.
      other: None: `optax.adamw` at 1e-3.

    Raises:
      ValueError: from ``update``, without ``value=``, the loss before the update, or
        where it is no scalar.
    """
    rule = optax.with_extra_args_support(tx)
    safe = optax.with_extra_args_support(optax.adamw(1e-3) if other is None else other)

    def init_fn(params):
        largest = jnp.finfo(jnp.float32).max
        # arrays of their own, so that the state can be donated
        scalars = [jnp.float32(x) for x in (0, 0, largest, 0, 1)]
        mean, deviation, best, noise, trust = scalars
        states = rule.init(params), safe.init(params)
        return FallbackState(jnp.int32(0), mean, deviation, best, noise, trust, *states)

    def update_fn(updates, state, params=None, *, value=None, **extra):
        if value is None:
            raise ValueError(
                "the fallback reads the loss: tx.update(grads, state, params, "
                "value=loss)"
            )
        if jnp.shape(value):
            raise ValueError(
                f"value= has the shape {list(jnp.shape(value))}: give the fallback the "
                "mean loss, a scalar"
            )
        value = jnp.asarray(value, jnp.float32)
        finite = jnp.isfinite(value) & _all_finite(updates)
        updates = jax.tree.map(
            lambda g: jnp.where(finite, g, jnp.zeros_like(g)), updates
        )
        ours, rule_state = rule.update(
            updates, state.rule, params, value=value, **extra
        )
        theirs, other_state = safe.update(
            updates, state.other, params, value=value, **extra
        )
        new = _watch(state, value, finite)
        sound = _all_finite(ours)
        trust = jnp.where(sound, new.trust, 0.0)

        def blend(a: Array, b: Array) -> Array:
            a = jnp.where(sound, a, jnp.zeros_like(a))
            b = jnp.where(jnp.isfinite(b), b, 0)  # 0 times infinity is no number
            mixed = trust * a + (1 - trust) * b
            return jnp.where(finite, mixed, 0).astype(a.dtype)

        blended = jax.tree.map(blend, ours, theirs)
        states = (rule_state, other_state), (state.rule, state.other)
        kept = finite & jnp.stack([sound & _all_finite(rule_state), jnp.bool_(True)])
        rule_state, other_state = (
            jax.tree.map(lambda a, b: jnp.where(keep, a, b), after, before)  # noqa: B023
            for keep, after, before in zip(kept, *states, strict=True)
        )
        return blended, new._replace(rule=rule_state, other=other_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _watch(state: FallbackState, value: Array, finite: Array) -> FallbackState:
    """Take one loss into the averages, and the trust that follows from them."""
    before = jnp.maximum(state.step, 1)  # the weights of no loss are 0
    level = state.mean / (1 - jnp.float32(_FAST) ** before)
    usual = state.deviation / (1 - jnp.float32(_SLOW) ** before)
    mean = _FAST * state.mean + (1 - _FAST) * value
    now = mean / (1 - jnp.float32(_FAST) ** (state.step + 1))
    # the noise of the best time: however slowly a loss explodes, it must not make
    # itself usual
    tests = state.step >= _WARM_UP
    fails = (now - state.best > 3 * state.noise) & tests
    error = jnp.where(state.step > 0, jnp.abs(value - level), 0)
    lacking = _RECOVER * (1 - state.trust)
    drift = lambda old, new: old + _FORGET * (new - old)  # noqa: E731
    better = now <= state.best
    new = state._replace(
        step=state.step + 1,
        mean=mean,
        deviation=_SLOW * state.deviation + (1 - _SLOW) * error,
        best=jnp.where(better, now, drift(state.best, now)),
        noise=jnp.where(better | ~tests, usual, drift(state.noise, usual)),
        trust=jnp.where(fails, _HALVE * state.trust, 1 - lacking),
    )
    kept = state._replace(trust=_HALVE * state.trust)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)


def _all_finite(tree: PyTree) -> Array:
    checks = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.stack(checks).all() if checks else jnp.bool_(True)
