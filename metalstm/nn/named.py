"""A user's network by its path, such as ``mymodule:CNN``."""

from __future__ import annotations

import functools
import sys
from typing import Any

from flax import linen as nn

from metalstm.base import Array, Learner, LearnerState
from metalstm.nn.flax_modules import from_flax
from metalstm.nn.heads import output_shape
from metalstm.nn.signatures import parameters_of
from metalstm.user_objects import maker_at

__all__ = ["learner_at"]


def learner_at(path: str, num_classes: int | None = None) -> Learner:
    """Make a learner of what ``path`` names, with this many outputs.

    Args:
      path: of a flax module's class, NNX or Linen, a Linen module, a
        `metalstm.Learner`, or a function whose return annotation is one of them (and
        which takes ``rngs``, for NNX). Where it takes ``num_classes``, it is given the
        number of outputs, or None for the features without a head.

    Raises:
      ValueError: for what `from_flax` refuses; when initialised, for outputs that are
        not [N, num_classes].
    """
    nnx = sys.modules.get("flax.nnx")  # whoever has a module imported it
    found = maker_at(
        path, "learner", (Learner, nn.Module, *([nnx.Module] if nnx else []))
    )
    try:
        learner = _learner_of(found, num_classes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"learner {path!r}: {error}") from error

    def init(key: Array, x: Any) -> LearnerState:
        try:
            state = learner.init(key, x)
            shape = output_shape(learner, state, x).shape
        except TypeError as error:
            if num_classes is not None:
                raise
            raise ValueError(
                f"learner {path!r} with num_classes=None, which asks for the features "
                f"without a head: {error}"
            ) from error
        if num_classes is not None and shape[1:] != (num_classes,):
            raise ValueError(
                f"learner {path!r} returns {list(shape)} for {shape[0]} example(s) of "
                f"{num_classes} classes: let it return [N, {num_classes}], such as by "
                "an argument num_classes"
            )
        return state

    return learner._replace(init=init)


def _learner_of(found: Any, num_classes: int | None) -> Learner:
    if isinstance(found, Learner):
        return found
    if isinstance(found, nn.Module) or not callable(found):
        return from_flax(found)
    parameters = parameters_of(found)
    given = {"num_classes": num_classes} if "num_classes" in parameters else {}
    if "rngs" in parameters:
        return from_flax(functools.partial(found, **given) if given else found)
    is_linen = isinstance(found, type) and issubclass(found, nn.Module)
    if is_linen or given or not parameters:
        made = found(**given)
        return made if isinstance(made, Learner) else from_flax(made)
    return from_flax(found)
