"""Compare a saved configuration with the present one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["ConfigMismatch", "check_config"]


class ConfigMismatch(ValueError):  # noqa: N818 (reads as what it is)
    """A checkpoint or a run folder belongs to another configuration."""


def check_config(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
    what: str = "the saved config differs",
    remedy: str = "use the saved values, or another folder",
) -> None:
    """Raise `ConfigMismatch` with one line per differing entry.

    Nested mappings are compared entry by entry under dotted names; ``ignore`` holds
    dotted names. Both sides are compared as JSON, so tuples equal lists.
    """
    ignored, absent = set(ignore), "(absent)"
    old, new = _flat_json(saved), _flat_json(current)
    lines = [
        f"  {name}: saved {old.get(name, absent)}, now {new.get(name, absent)}"
        for name in sorted(old.keys() | new.keys())
        if name not in ignored and old.get(name, absent) != new.get(name, absent)
    ]
    if lines:
        raise ConfigMismatch("\n".join([f"{what}:", *lines, remedy]))


def _flat_json(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat_json(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, sort_keys=True, default=str)
    return flat
