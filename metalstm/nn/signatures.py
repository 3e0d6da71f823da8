"""What a module's ``__call__`` and ``__init__`` take, and how they are given it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from metalstm.base import Norm, PyTree

__all__ = ["arguments_of", "has_norm_switch", "parameters_of"]

_NORM_SWITCHES = {"train", "training", "is_training", "use_running_average"}
_ANY_NUMBER = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def parameters_of(make: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or of a class's ``__init__``.

    The signature of an NNX class is that of its metaclass, ``(*args, **kwargs)``.
    """
    while isinstance(make, functools.partial):
        make = make.func
    if isinstance(make, type):
        init = getattr(make, "__init__")  # noqa: B009 (of the class, for a type checker)
        _, *parameters = inspect.signature(init).parameters.items()
        return dict(parameters)
    return dict(inspect.signature(make).parameters)


def has_norm_switch(module: type) -> bool:
    """Whether ``__call__`` can be told which statistics to normalise by."""
    return not _NORM_SWITCHES.isdisjoint(inspect.signature(module.__call__).parameters)


def arguments_of(
    module: type, x: PyTree, *, norm: Norm, dropout: bool
) -> tuple[tuple, dict[str, Any]]:
    """What ``__call__`` is given: x, and the switches that it takes.

    A tuple is spread where ``__call__`` needs several inputs, a mapping where its keys
    are their names.

    Raises:
      ValueError: ``__call__`` needs more than x and the switches, or takes less.
    """
    _, *parameters = inspect.signature(module.__call__).parameters.values()
    values = dict.fromkeys(_NORM_SWITCHES, norm != "stored")
    values["use_running_average"] = norm == "stored"
    values["deterministic"] = not dropout
    switches = {p.name: values[p.name] for p in parameters if p.name in values}
    inputs = [p for p in parameters if p.name not in switches]
    named = [p for p in inputs if p.kind not in _ANY_NUMBER]
    names = [p.name for p in named]
    needed = {p.name for p in named if p.default is p.empty}
    if isinstance(x, Mapping) and needed <= set(x) <= set(names):
        return (), {**x, **switches}
    given = tuple(x) if isinstance(x, list | tuple) and len(needed) > 1 else (x,)
    places = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    too_many = len(given) > len(places) and len(named) == len(inputs)
    if too_many or needed - set(places[: len(given)]):
        raise ValueError(
            f"{module.__name__}.__call__ takes {', '.join(names) or 'no input'}, and x "
            f"has {len(given)} part(s): let x be an array, a tuple with a part for "
            "each input or a dict with their names; a switch is called "
            f"{', '.join(sorted(values))}"
        )
    return given, switches
