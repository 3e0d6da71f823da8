"""Checks of arguments, with error messages of one form.

A message is ``name=value: choose ...``: the argument, its value and the remedy.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

__all__ = [
    "check_at_least",
    "check_choice",
    "check_count",
    "check_features",
    "check_positive",
    "check_share",
    "did_you_mean",
]


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``.

    >>> check_choice("keep", "some", ("all", "remat"))
    Traceback (most recent call last):
    ValueError: keep='some': choose one of all, remat
    """
    choices = tuple(choices)
    if value not in choices:
        options = ", ".join(map(str, choices))
        raise ValueError(f"{name}={value!r}: choose one of {options}")


def check_at_least(name: str, value: Any, minimum: float, or_else: str = "") -> None:
    """Raise ValueError unless ``value >= minimum``; NaN is refused too.

    ``or_else`` is another remedy, such as ``"or None"``.
    """
    if not value >= minimum:
        remedy = f" {or_else}" if or_else else ""
        raise ValueError(f"{name}={value}: choose {minimum} or more{remedy}")


def check_count(name: str, value: Any, minimum: int = 1, or_else: str = "") -> None:
    """Raise ValueError unless ``value`` is an integer, and ``value >= minimum``."""
    try:
        operator.index(value)
    except TypeError:
        remedy = f" {or_else}" if or_else else ""
        raise ValueError(
            f"{name}={value!r}: choose an integer, {minimum} or more{remedy}"
        ) from None
    check_at_least(name, value, minimum, or_else)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless ``value > 0``; NaN is refused too."""
    if not value > 0:
        raise ValueError(f"{name}={value}: choose a number above 0")


def check_share(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise ValueError unless ``0 < value <= 1``; ``zero`` allows 0 too."""
    if not (0 < value <= 1 or (zero and value == 0)):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{name}={value}: choose a number in {interval}")


def check_features(
    shape: tuple[int, ...], user: str, remedy: str = "flatten them"
) -> None:
    """Raise ValueError unless ``shape``, of a learner's outputs, is [N, d].

    ``user`` is what needs features, such as ``"the controller"``.
    """
    if len(shape) != 2:
        raise ValueError(
            f"the learner returned shape {shape}, but {user} needs features [N, d]: "
            f"{remedy}"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known names nearest to ``name``, or list them all."""
    import difflib

    known = sorted(known)
    near = difflib.get_close_matches(name, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose one of {', '.join(known)}"
