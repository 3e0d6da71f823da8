"""Different rules for different groups of parameters, by optax's multi-transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.rules.classic import as_rule, common_traits

__all__ = ["by_group", "conv_or_dense", "matrix_or_vector", "only"]


def by_group(
    rules: Mapping[str, UpdateRule | optax.GradientTransformation],
    label_fn: Callable[[Any, Array], str],
) -> UpdateRule:
    """Give each group of tensors its own rule.

    Args:
      rules: {label: rule or optax transform}.
      label_fn: (path, tensor) -> label, the path as in
        `jax.tree_util.tree_map_with_path`; `conv_or_dense` and `matrix_or_vector` are
        two.

    Returns:
      A rule whose parameters are {label: that rule's parameters}. It is not
      coordinate-wise: the tensor a coordinate lies in decides its rule.

    Raises:
      ValueError: no rules; or, from ``init``, a label without a rule.
    """
    if not rules:
        raise ValueError(
            "by_group needs at least one rule: by_group({label: rule}, ..)"
        )
    parts = {name: as_rule(rule) for name, rule in rules.items()}

    def labels(params: PyTree) -> PyTree:
        def label(path, leaf):
            name = label_fn(path, leaf)
            if name not in parts:
                raise ValueError(
                    f"label_fn calls {jax.tree_util.keystr(path)} {name!r}, which has "
                    f"no rule: there are rules for {', '.join(sorted(parts))}"
                )
            return name

        return jax.tree_util.tree_map_with_path(label, params)

    def init(key: Array, params: PyTree) -> PyTree:
        names = labels(params)
        out = {}
        for k, (group, rule) in enumerate(sorted(parts.items())):
            members = jax.tree.map(
                lambda leaf, name: leaf if name == group else optax.MaskedNode(),  # noqa: B023
                params,
                names,
            )
            out[group] = rule.init(jax.random.fold_in(key, k), members)
        return out

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        bound = {name: rule.bind(rule_params[name]) for name, rule in parts.items()}
        return optax.with_extra_args_support(optax.multi_transform(bound, labels))

    traits = common_traits(*parts.values())._replace(coordinatewise=False)
    return UpdateRule(init, bind, traits)


def only(
    rule: UpdateRule | optax.GradientTransformation,
    part: str | Callable[[tuple[str, ...], Array], bool],
) -> UpdateRule:
    """Apply ``rule`` to the tensors whose path has a ``part``; the others stay.

    ``only(rule, "head")`` updates the last layer of the networks that come with the
    library. The rule's parameters are those of ``rule`` alone.

    Args:
      part: a name in the path, or a function of (path, tensor), such as
        ``nnx.PathContains("head")``.

    Raises:
      ValueError: from ``init``, when no parameter lies in ``part``.
    """

    def label(path: Any, leaf: Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        moves = part(tuple(names), leaf) if callable(part) else part in names
        return "moves" if moves else "stays"

    nothing = as_rule(optax.set_to_zero(), RuleTraits(smooth=True, reads_loss=False))
    both = by_group({"moves": rule, "stays": nothing}, label)

    def init(key: Array, params: PyTree) -> PyTree:
        paths = jax.tree_util.tree_leaves_with_path(params)
        if all(label(path, leaf) == "stays" for path, leaf in paths):
            found = ", ".join(jax.tree_util.keystr(path) for path, _ in paths)
            raise ValueError(f"part={part!r} is in none of the paths {found}")
        return both.init(key, params)["moves"]

    return both._replace(
        init=init, bind=lambda moving: both.bind({"moves": moving, "stays": ()})
    )


def conv_or_dense(path: Any, leaf: Array) -> str:
    """``"conv"`` for a convolution's kernel, and for its bias where its path says conv.

    Everything else is ``"dense"``.
    """
    named = "conv" in jax.tree_util.keystr(path).lower()
    return "conv" if named or jnp.ndim(leaf) > 2 else "dense"


def matrix_or_vector(path: Any, leaf: Array) -> str:
    """``"matrix"`` for kernels, ``"vector"`` for biases, scales and scalars."""
    del path
    return "matrix" if jnp.ndim(leaf) > 1 else "vector"
