"""Whether a value read from a file is what an option's annotation says."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_options(group: str, options: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The known ones of a group's saved options, lists as tuples and paths as paths.

    Null is "not said" for an option that is never None: it keeps its default.

    Raises:
      ValueError: the group is no mapping, or an option is not of its type.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"config.json has {group}={_short(options)} and no options")
    found = {}
    for name, hint in hints.items():
        if name not in options:
            continue
        value = options[name]
        if isinstance(value, list):
            value = tuple(value)
            if hint == tuple[Path, ...]:
                value = tuple(Path(v) if isinstance(v, str) else v for v in value)
        elif isinstance(value, str) and not fits(value, hint) and fits(Path(), hint):
            value = Path(value)
        elif value is None and not fits(value, hint):
            continue
        if not fits(value, hint):
            raise ValueError(
                f"config.json has --{name.replace('_', '-')} {_short(value)}, which is "
                f"not {_describe(hint)}: put a copy of the file back, or start again"
            )
        found[name] = value
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type; whole numbers are floats too."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if hint in (int, float):
        number = int if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _describe(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    return name.replace("typing.", "").replace("pathlib.", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + ".."


def to_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_config(folder: Path) -> dict[str, Any]:
    """What a run wrote of its options, methods and data.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: its config.json is damaged.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document["config"], dict):
            raise TypeError("config is no mapping")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.json; give the folder "
            "that a run printed"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): put a copy of it "
            "back, or start again in another --workdir"
        ) from None
    return document
