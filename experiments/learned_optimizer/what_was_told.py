"""What a rule was told in meta-training, and is told again wherever it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from metalstm.base import PyTree, UpdateRule
from metalstm.rules import SavedRule

__all__ = ["Told", "told", "without_length"]


class Told(NamedTuple):
    """A trained rule that hides what its meta-training hid."""

    transform: optax.GradientTransformationExtraArgs
    progress: bool  # whether `metalstm.rules.with_progress` is to be put around it
    length: bool


def told(saved: SavedRule, *, progress: bool) -> Told:
    """Read it from a file of a meta-training.

    Args:
      progress: whether a rule whose file does not say is told its progress.
    """
    trained: dict[str, Any] = (
        saved.info.get("training") or saved.info.get("config") or {}
    )
    length = trained.get("tell_length", True)
    rule = saved.rule if length else without_length(saved.rule)
    share = trained.get("tell_progress", float(progress))
    return Told(rule.bind(saved.params), share > 0, length)


def without_length(rule: UpdateRule) -> UpdateRule:
    """Hide the length of training from the rule, not its progress."""

    def bind(params: PyTree) -> optax.GradientTransformationExtraArgs:
        tx = rule.bind(params)

        def update(grads, state, params=None, **extra):
            return tx.update(grads, state, params, **extra | {"num_steps": 0.0})

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return rule._replace(bind=bind)
