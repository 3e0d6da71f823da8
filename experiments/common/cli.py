"""The command line of a script: typed options, and the flags made of them.

Options are groups, nested in one config. `parse` makes flags of
their fields, `check` refuses what their types exclude. No jax is imported here, so that
--help is quick.
"""

from __future__ import annotations

import contextlib
import io
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import tyro

from experiments.common.saved_options import did_you_mean, split_commas

__all__ = [
    "AT_LEAST_0",
    "ByName",
    "Count",
    "Flat",
    "Names",
    "Natural",
    "Options",
    "Pair",
    "Positive",
    "Share",
    "check",
    "check_multiple",
    "check_names",
    "check_range",
    "parse",
    "replace",
    "said",
    "split_names",
]

Config = TypeVar("Config")


class Options(msgspec.Struct, frozen=True):
    """A group of options; where it has a ``tag``, its JSON names its kind."""


_FLAT = tyro.conf.OmitArgPrefixes
_BY_NAME = tyro.conf.arg(name="")
Flat = Annotated[Config, _FLAT]
"""A group whose flags have no prefix."""
ByName = Annotated[dict[str, Config], _BY_NAME]
"""Groups whose flags have their names as prefix: --NAME.OPTION."""


def said(kind: Any, text: str) -> Any:
    """The type of an option whose help is ``text``."""
    return Annotated[kind, tyro.conf.arg(help=text)]


def split_names(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in split_commas(words) if name != "none")


Names = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME[,NAME ..]",
        instance_from_str=split_names,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: list(value) or ["none"],
    ),
]
"""Names with commas or spaces between them; ``none`` is no name."""

AT_LEAST_0 = msgspec.Meta(ge=0)
Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, AT_LEAST_0]
Pair = Annotated[int, msgspec.Meta(ge=2)]  # what has an interval, or two classes
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


def parse(
    default: Config,
    arguments: Sequence[str],
    *,
    module: str,
    description: str | None,
    topics: Sequence[str] = (),
    prefix: str = "--",
) -> Config:
    """Read the flags of ``python -m MODULE``; ``default`` says what others are.

    Args:
      topics: groups that --help shows when it is asked for them: --help TOPIC.
      prefix: of the flags in error messages.

    Raises:
      ValueError: an unknown flag, a value of another type or outside its limits.
      SystemExit: after --help.
    """
    shown: Any = default
    if topics and "--help" in arguments:
        asked = [*arguments, ""][arguments.index("--help") + 1]
        hints = typing.get_type_hints(type(default), include_extras=True)
        names = [asked] if asked in topics else [n for n in hints if n not in topics]
        kind = msgspec.defstruct("Flags", [(name, hints[name]) for name in names])
        shown = kind(*(getattr(default, name) for name in names))
        arguments = ["--help"]
        description = f"{description}\n\nMore: --help {', --help '.join(topics)}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config: Config = tyro.cli(
                type(shown),
                args=list(arguments),
                default=shown,
                description=description,
                prog=f"python -m {module}",
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_sentence(said.getvalue(), prefix)) from None
    check(config, prefix)
    return config


def _sentence(box: str, prefix: str) -> str:
    """What tyro says in a box, its title, its hints and its frame omitted."""
    _, *lines = (line.strip("│ ") for line in box.splitlines())
    blocks = " ".join(line if line.strip("─-╰╯") else "\n" for line in lines)
    text = blocks.strip().split("\n")[0].strip().removeprefix("Error parsing ")
    return prefix + text.removeprefix("--") if text.startswith("--") else text


def check(options: Any, prefix: str = "--") -> None:
    """Refuse numbers outside the limits of their types, and NaN.

    Raises:
      ValueError: names the flag, the value and what would do.
    """
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            for key, one in value.items():
                check(one, f"{prefix}{key}.")
        elif hasattr(type(value), "__annotations__"):
            flat = _FLAT in getattr(hint, "__metadata__", ())
            check(value, prefix if flat else f"{flag}.")
        else:
            _check_value(flag, value, tuple(_limits(hint)))


def _check_value(flag: str, value: Any, limits: Sequence[msgspec.Meta]) -> None:
    parts = value if isinstance(value, tuple) else (value,)
    if limits and not parts:
        raise ValueError(f"{flag} is empty: give at least one")
    for part in parts:
        if isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{flag} {value}: give a number")
        for limit in limits if part is not None else ():
            if limit.ge is not None and part < limit.ge:
                raise ValueError(f"{flag} {part:g}: choose {limit.ge:g} or more")
            if limit.gt is not None and not part > limit.gt:
                raise ValueError(f"{flag} {part:g}: choose a number above {limit.gt:g}")
            if limit.lt is not None and not part < limit.lt:
                raise ValueError(f"{flag} {part:g}: choose a number below {limit.lt:g}")
            if limit.le is not None and part > limit.le:
                raise ValueError(f"{flag} {part:g}: choose {limit.le:g} or less")


def _limits(hint: Any) -> Iterator[msgspec.Meta]:
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, msgspec.Meta):
            yield part
    for part in typing.get_args(hint)[: 1 if hasattr(hint, "__metadata__") else None]:
        yield from _limits(part)


def check_multiple(flag: str, value: int, of: str, divisor: int) -> None:
    """Refuse a value of ``flag`` that the value of another does not divide."""
    if value % divisor:
        nearest = max(value // divisor, 1) * divisor
        raise ValueError(
            f"{flag} {value} is not a multiple of {of} {divisor}: choose {nearest}, say"
        )


def check_names(flag: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known, and one that comes twice.

    Raises:
      ValueError: names the flag, and the nearest of those that are known.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} {name}: {did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise ValueError(f"{flag} names {name} twice: drop one")


def check_range(flag: str, low: float, high: float) -> None:
    """Refuse two values of ``flag`` unless 0 < low <= high."""
    if not 0 < low <= high:
        raise ValueError(f"{flag} {low} {high}: choose 0 < low <= high")


def replace(options: Config, **changes: Any) -> Config:
    """`options` with other values of some fields."""
    return msgspec.structs.replace(options, **changes)  # type: ignore[type-var]
