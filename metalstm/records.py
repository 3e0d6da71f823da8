"""What NamedTuples of functions say of themselves: their help, and what made them.

`metalstm.save` writes the constructor of an algorithm, a learner or a rule and its
arguments, as the spec of `metalstm.specs`, next to the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import numpy as np

__all__ = ["GIVEN", "Record", "document_slots", "recorded", "to_spec"]

Constructor = TypeVar("Constructor", bound=Callable[..., Any])

GIVEN = "given"
"""The one key of what stands in a spec for an object that no file can hold."""


class Record:
    """The call that made a NamedTuple. It is compared by identity, as functions are."""

    def __init__(self, kind: str, name: str, arguments: Mapping[str, Any], made: Any):
        self.kind, self.name, self.arguments = kind, name, arguments
        self._made = tuple(made._replace(made_by=None))

    def is_of(self, value: Any) -> bool:
        """Whether ``value`` is still what was made, with no field replaced."""
        fields = tuple(value._replace(made_by=None))
        return all(a is b for a, b in zip(fields, self._made, strict=True))


def recorded(kind: str) -> Callable[[Constructor], Constructor]:
    """Let a constructor note its name and arguments in ``made_by`` of what it returns.

    Args:
      kind: ``"algorithm"``, ``"learner"`` or ``"rule"``: the word by which a spec
        names it.
    """

    def decorate(constructor):
        signature = inspect.signature(constructor)

        @functools.wraps(constructor)
        def construct(*args, **kwargs):
            made = constructor(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments: dict[str, Any] = {}
            for name, value in bound.arguments.items():
                how = signature.parameters[name].kind
                if how is inspect.Parameter.VAR_KEYWORD:
                    arguments |= value
                elif how is inspect.Parameter.VAR_POSITIONAL:
                    arguments["parts"] = value  # of a chain
                else:
                    # a method made of another is a spec inside a spec
                    arguments["of" if name == kind else name] = value
            record = Record(kind, constructor.__name__, arguments, made)
            return made._replace(made_by=record)

        return construct

    return decorate


def to_spec(value: Any) -> tuple[Any, dict[str, Any]]:
    """Return the spec of what a constructor made, and the objects that it cannot hold.

    The latter (a user's network, an optax transform) are by the name of the argument
    that they were given as, and stand in the spec as ``{"given": name}``.

    Raises:
      ValueError: two different objects were given by one name.
    """
    given: dict[str, Any] = {}

    def convert(value: Any, name: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic) or (
            hasattr(value, "dtype") and np.ndim(value) == 0
        ):
            return np.asarray(value).item()
        record = getattr(value, "made_by", None)
        if isinstance(record, Record) and record.is_of(value):
            arguments = {k: convert(v, k) for k, v in record.arguments.items()}
            return {record.kind: record.name} | arguments
        if dataclasses.is_dataclass(value) and hasattr(value, "order"):
            return dataclasses.asdict(value)  # type: ignore[arg-type]
        if type(value) in (list, tuple):
            return [convert(part, name) for part in value]
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return {key: convert(part, name) for key, part in value.items()}
        if given.setdefault(name, value) is not value:
            raise ValueError(
                f"two objects that a file cannot hold were given as {name}=: make the "
                "algorithm of constructors of metalstm, or of one such object"
            )
        return {GIVEN: name}

    return convert(value, "algorithm"), given


def document_slots(*types: Any) -> None:
    """Let help() of a NamedTuple show, at each function, what the function's type says.

    The type is a Protocol, or optional.
    """
    for kind in types:
        hints = get_type_hints(kind)
        kind.__new__.__annotations__ = hints  # classes, not ForwardRefs
        for name, hint in hints.items():
            function = getattr(hint, "__args__", (hint,))[0]  # Adapt of Adapt | None
            if getattr(function, "_is_protocol", False):
                getattr(kind, name).__doc__ = function.__call__.__doc__
