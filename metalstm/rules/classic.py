"""Hand-made rules: any optax transform, and SGD whose rates are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree, UpdateRule

__all__ = ["chain", "from_optax", "learned_sgd", "tunable"]


def from_optax(tx: optax.GradientTransformation) -> UpdateRule:
    """Any optax transform is a rule with nothing to learn."""
    bound = optax.with_extra_args_support(tx)
    return UpdateRule(lambda key, params: (), lambda rule_params: bound)


def tunable(
    factory: Callable[..., optax.GradientTransformation], **hyperparameters: float
) -> UpdateRule:
    """An optax factory whose keyword arguments are the rule's parameters.

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


def _cast(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda x, ref: x.astype(jnp.result_type(ref)), tree, like)


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
      num_steps: a rate of its own for each of this many updates; later updates use the
        last one. None: the same rate at every step.
    """
    if per not in ("rule", "tensor", "parameter"):
        raise ValueError(f"per={per!r}: choose one of rule, tensor, parameter")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: choose at least 1, or None")
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

    return UpdateRule(
        init, bind, coordinatewise=per == "rule", smooth=True, reads_loss=False
    )


def chain(*rules: UpdateRule | optax.GradientTransformation) -> UpdateRule:
    """Apply rules (or optax transforms) one after another, as `optax.chain` does.

    The chain is coordinate-wise when all of it is; an optax transform is taken not to
    be, since global-norm clipping mixes coordinates.
    """
    parts = [r if isinstance(r, UpdateRule) else from_optax(r) for r in rules]
    if not parts:
        raise ValueError("chain needs at least one rule")

    def init(key: Array, params: PyTree) -> PyTree:
        keys = jax.random.split(key, len(parts))
        return tuple(r.init(k, params) for r, k in zip(parts, keys, strict=True))

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        bound = [r.bind(p) for r, p in zip(parts, rule_params, strict=True)]
        return optax.with_extra_args_support(optax.chain(*bound))

    return UpdateRule(
        init,
        bind,
        coordinatewise=all(r.coordinatewise for r in parts),
        smooth=all(r.smooth for r in parts),
        reads_loss=any(r.reads_loss for r in parts),
    )
