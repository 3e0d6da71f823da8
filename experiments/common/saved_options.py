"""Options as JSON and back; words of a command line before it is parsed.

No jax here, so that --help is quick.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

__all__ = [
    "did_you_mean",
    "flag",
    "flags_of",
    "from_json",
    "located",
    "read_config",
    "read_json",
    "split_commas",
    "to_json",
    "value_of",
    "values_of",
    "with_settings",
]

Options = TypeVar("Options", bound=msgspec.Struct)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def to_json(options: Any) -> dict[str, Any]:
    """The options as what JSON would give back: lists for tuples, strings for paths."""
    return json.loads(json.dumps(msgspec.to_builtins(options, enc_hook=str)))


def from_json(kind: type[Options], saved: Any, source: str = "config.json") -> Options:
    """Build options from JSON; options added since keep their defaults.

    Raises:
      ValueError: an option is not of its type or outside its limits.
    """
    try:
        return msgspec.convert(saved, kind, dec_hook=_decode)
    except (msgspec.ValidationError, TypeError, UnicodeError) as error:
        raise ValueError(
            f"{source} holds options that cannot be: {error}; put a copy of the file "
            "back, or start again"
        ) from None


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{_short(value)} is not a {kind.__name__}")


def with_settings(
    options: Options, settings: Mapping[str, Any], skip: Iterable[str] = ()
) -> Options:
    """Set the options that ``settings`` names, at any depth; others are ignored.

    Raises:
      ValueError: a value is not of its option's type.
    """
    changes, skip = {}, set(skip)
    hints = typing.get_type_hints(type(options), include_extras=True)
    for name in type(options).__struct_fields__:
        value = getattr(options, name)
        if isinstance(value, msgspec.Struct):
            changes[name] = with_settings(value, settings, skip)
        elif name in settings and name not in skip:
            given = settings[name]
            try:
                changes[name] = msgspec.convert(given, hints[name], dec_hook=_decode)
            except msgspec.ValidationError as error:
                raise ValueError(f"{flag(name)} {_short(given)}: {error}") from None
    return msgspec.structs.replace(options, **changes)


def flags_of(kind: type[msgspec.Struct]) -> set[str]:
    """The names of all options, those of groups within groups included."""
    found: set[str] = set()
    hints = typing.get_type_hints(kind)
    for name in kind.__struct_fields__:
        nested = isinstance(hints[name], type) and issubclass(
            hints[name], msgspec.Struct
        )
        found |= flags_of(hints[name]) if nested else {name}
    return found


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """Decode a file as a type that msgspec knows.

    Raises:
      ValueError: it is no such JSON; names the file and the remedy.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """What a run wrote of its options, methods and data.

    ``folder`` may be a file of `metalstm.save` whose ``info`` has it, or the name of a
    trained method of the package.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: its config.json is damaged.
    """
    folder = located(folder)
    if folder.suffix == ".npz":
        return _of_file(folder)
    path = folder / "config.json"
    remedy = "put a copy of it back, or start again in another --workdir"
    try:
        document = read_json(path, dict[str, Any], remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.json; give the folder "
            "that a run printed"
        ) from None
    if not isinstance(document.get("config"), dict):
        raise ValueError(f"{path} is damaged (config is no mapping): {remedy}")
    return document


def located(folder: Path) -> Path:
    """The folder or file, or where the package has the trained method of this name."""
    shipped = Path(__file__).parents[2] / "metalstm" / "shipped" / f"{folder}.npz"
    return shipped if not folder.exists() and shipped.exists() else folder


def _of_file(path: Path) -> dict[str, Any]:
    from metalstm.saving import read_info  # imports jax

    document = read_info(path)
    if not isinstance(document.get("config"), dict):
        raise ValueError(
            f"{path} does not say how to test it: give a run folder, or a trained "
            "method of the package by name"
        )
    return document


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The first value of a flag on a command line that is not parsed yet."""
    return next(iter(values_of(flag, arguments)), None)


def values_of(flag: str, arguments: Sequence[str]) -> list[str]:
    """The values of a flag that takes several."""
    found: list[str] = []
    taking = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            taking = name.replace("_", "-") == flag
            found = [] if taking else found
            found += [value] if taking and equals else []
        elif taking:
            found.append(argument)
    return found


def split_commas(values: Iterable[str]) -> tuple[str, ...]:
    parts = [part for value in values for part in value.split(",")]
    return tuple(part for part in parts if part)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]}? " if close else "not known. "
    return f"{hint}Choose from {', '.join(choices)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + ".."
