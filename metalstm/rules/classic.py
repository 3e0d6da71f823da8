"""Rules made of optax transforms, chains, and SGD whose rates are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.records import recorded

__all__ = [
    "as_rule",
    "chain",
    "check_differentiable",
    "common_traits",
    "learned_scale",
    "learned_sgd",
    "tunable",
]


def as_rule(
    rule: UpdateRule | optax.GradientTransformation, traits: RuleTraits | None = None
) -> UpdateRule:
    """Return ``rule`` as an `UpdateRule`: an optax transform has nothing to learn.

    Every function of the library that takes a rule calls this, so that a transform may
    stand wherever a rule may.

    Args:
      rule: an `UpdateRule`, or any optax transform.
      traits: what you promise about it. None: what the rule says itself; of a transform
        nothing is known.

    Raises:
      TypeError: it is neither.

    >>> as_rule(optax.sgd(0.1)).init(jax.random.key(0), {})
    ()
    """
    if isinstance(rule, UpdateRule):
        return rule if traits is None else rule._replace(traits=traits)
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(
            f"rule={rule!r} is neither an UpdateRule nor an optax transform: build one "
            "with metalstm.rules or optax"
        )
    transform = optax.with_extra_args_support(rule)

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        if jax.tree.leaves(rule_params):
            raise ValueError(
                "an optax transform has nothing to learn: give rule_params=(), or "
                "make its arguments the rule's parameters with metalstm.rules.tunable"
            )
        return transform

    return UpdateRule(lambda key, params: (), bind, traits or RuleTraits())


def tunable(
    factory: Callable[..., optax.GradientTransformation], **hyperparameters: float
) -> UpdateRule:
    """Make an optax factory's keyword arguments the rule's parameters.

    They may be meta-learned, or set from a grid without compiling anything twice::

        rule = tunable(optax.adam, learning_rate=1e-3)
        rule.bind({"learning_rate": 3e-4})
    """

    def init(key: Array, params: PyTree) -> PyTree:
        del key, params
        return {name: jnp.float32(value) for name, value in hyperparameters.items()}

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        tx = optax.with_extra_args_support(factory(**rule_params))

        def update_fn(updates, state, params=None, **extra):
            # hyperparameters that are arrays promote bfloat16 leaves, also in the state
            new_updates, new_state = tx.update(updates, state, params, **extra)
            return _cast(new_updates, updates), _cast(new_state, state)

        return optax.GradientTransformationExtraArgs(tx.init, update_fn)

    return UpdateRule(init, bind)


def _cast(tree: PyTree, template: PyTree) -> PyTree:
    return jax.tree.map(lambda x, ref: x.astype(jnp.result_type(ref)), tree, template)


@recorded("rule")
def learned_sgd(
    rate: float | tuple[float, float] = 0.01,
    *,
    per: Literal["rule", "tensor", "parameter"] = "rule",
    num_steps: int | None = None,
) -> UpdateRule:
    """SGD with learned rates: theta_t = theta_{t-1} - alpha * grad.

    ``per="parameter"`` is Meta-SGD (Li et al., 2017); ``per="tensor"`` with
    ``num_steps`` is MAML++'s per-layer per-step rates (Antoniou et al., 2019).

    Args:
      rate: where alpha starts, or a range (low, high) to draw it from.
      per: one rate for all, for each tensor, or for each parameter.
      num_steps: a separate rate for each of this many updates; later updates use the
        last one. None: the same rate at every step.

    Raises:
      ValueError: an argument outside these choices.

    >>> tx = learned_sgd().bind(0.1)
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]
    Array([-0.1, -0.1], dtype=float32)
    """
    check_choice("per", per, ("rule", "tensor", "parameter"))
    if num_steps is not None:
        check_at_least("num_steps", num_steps, 1, "or None")
    low, high = rate if isinstance(rate, tuple) else (rate, rate)
    lead = () if num_steps is None else (num_steps,)

    def init(key: Array, params: PyTree) -> PyTree:
        if per == "rule":
            return jax.random.uniform(key, lead, jnp.float32, low, high)
        leaves, treedef = jax.tree.flatten(params)
        rates = [
            jax.random.uniform(
                jax.random.fold_in(key, k),
                lead + (jnp.shape(leaf) if per == "parameter" else ()),
                jnp.float32,
                low,
                high,
            )
            for k, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, rates)

    def bind(rates: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            del params
            return jnp.int32(0)

        def update_fn(updates, step, params=None, **extra):
            del params, extra

            def delta(rate, g):
                if num_steps is not None:
                    rate = rate[jnp.minimum(step, num_steps - 1)]
                return (-rate * g).astype(g.dtype)

            if per == "rule":
                out = jax.tree.map(lambda g: delta(rates, g), updates)
            else:
                # keyed on the gradient's structure, so that masked leaves are skipped
                out = jax.tree.map(
                    lambda g, rate: delta(rate, g),
                    updates,
                    jax.tree.unflatten(
                        jax.tree.structure(updates), jax.tree.leaves(rates)
                    ),
                )
            return out, step + 1

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = RuleTraits(coordinatewise=per == "rule", smooth=True, reads_loss=False)
    return UpdateRule(init, bind, traits)


@recorded("rule")
def learned_scale(scale: float = 1.0) -> UpdateRule:
    """Multiply updates by a learned positive number, whose parameter is its logarithm.

    >>> tx = learned_scale().bind(jnp.log(2.0))
    >>> tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]
    Array([2., 2.], dtype=float32)
    """
    check_positive("scale", scale)

    def bind(log_scale: Array) -> optax.GradientTransformationExtraArgs:
        def update(updates, params):
            del params
            factor = jnp.exp(log_scale)
            return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates)

        return optax.with_extra_args_support(optax.stateless(update))

    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    return UpdateRule(lambda key, params: jnp.float32(math.log(scale)), bind, traits)


@recorded("rule")
def chain(*rules: UpdateRule | optax.GradientTransformation) -> UpdateRule:
    """Apply rules (or optax transforms) one after another, as `optax.chain` does.

    Its parameters are the tuple of theirs. It promises what all of them promise; of an
    optax transform nothing is known (global-norm clipping mixes coordinates), unless
    `as_rule` is told.

    Raises:
      ValueError: there is no rule.
    """
    parts = [as_rule(rule) for rule in rules]
    if not parts:
        raise ValueError("chain needs at least one rule")

    def init(key: Array, params: PyTree) -> PyTree:
        keys = jax.random.split(key, len(parts))
        return tuple(r.init(k, params) for r, k in zip(parts, keys, strict=True))

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        bound = [r.bind(p) for r, p in zip(parts, rule_params, strict=True)]
        return optax.with_extra_args_support(optax.chain(*bound))

    return UpdateRule(init, bind, common_traits(*parts))


def common_traits(*rules: UpdateRule) -> RuleTraits:
    """Return what a rule composed of ``rules`` may promise."""
    return RuleTraits(
        coordinatewise=all(rule.traits.coordinatewise for rule in rules),
        smooth=all(rule.traits.smooth for rule in rules),
        reads_loss=any(rule.traits.reads_loss for rule in rules),
    )


def check_differentiable(rule: UpdateRule, params: PyTree) -> None:
    """Refuse a rule whose second order is NaN where dead ReLUs put it.

    They make coordinates of the gradient zero, or all those of a tensor, but not all of
    them: clipping by the global norm, whose derivative is not finite at zero, is fine.

    Args:
      params: of the learner; their names and ranks are read, since a rule may too.

    Raises:
      ValueError: its derivative by a zero gradient is not finite, and it does not
        promise to be smooth.
    """
    if rule.traits.smooth:
        return
    leaves, tree = jax.tree.flatten(params)
    with jax.ensure_compile_time_eval():
        small = [jnp.ones((2,) * max(jnp.ndim(leaf), 1)) for leaf in leaves]
        # a part of one tensor's gradient is zero, all of the next one's, and so on
        grads = [x * 0 if n % 2 else x.at[0].set(0) for n, x in enumerate(small)]
        params = jax.tree.unflatten(tree, small)

        def total(grads):
            tx = rule.bind(rule.init(jax.random.key(0), params))
            updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(1))
            return sum(leaf.sum() for leaf in jax.tree.leaves(updates))

        derivatives = jax.tree.leaves(jax.grad(total)(jax.tree.unflatten(tree, grads)))
    if not all(np.isfinite(leaf).all() for leaf in derivatives):
        raise ValueError(
            "differentiation=second_order(), but the rule's derivative at a zero "
            "gradient is not finite, and a dead ReLU gives zero gradients: choose "
            "first_order(), or make it smooth (optax.adam has eps_root=1e-8; clip by "
            "optax.clip or optax.clip_by_global_norm), or promise it with "
            "as_rule(rule, RuleTraits(smooth=True))"
        )
