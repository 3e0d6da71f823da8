"""Named recipes: presets.toml, read into settings for all methods and for each."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.saved_options import did_you_mean
from experiments.few_shot.methods import METHODS


class Preset(NamedTuple):
    shared: Mapping[str, Any] = {}  # option -> value, for every method that has it
    each: Mapping[str, Mapping[str, Any]] = {}  # method -> option -> value

    def of(self, method: str) -> Mapping[str, Any]:
        return self.each.get(method, {})


def preset(name: str) -> Preset:
    """Return the settings of a named recipe.

    Raises:
      ValueError: there is no such preset.
    """
    found = read_presets()
    if name not in found:
        raise ValueError(f"--preset {name}: {did_you_mean(name, found)}")
    return found[name]


@functools.cache
def read_presets() -> dict[str, Preset]:
    document = tomllib.loads(Path(__file__).with_name("presets.toml").read_text())
    parts = document["parts"]
    return {name: _read(table, parts) for name, table in document["presets"].items()}


def _read(table: Mapping[str, Any], parts: Mapping[str, Any]) -> Preset:
    each: dict[str, dict[str, Any]] = {}
    for entry in table.get("each", ()):
        settings = _whole(entry, parts)
        for method, row in METHODS.items():
            if {method, row.family} & set(entry["methods"]):
                each.setdefault(method, {}).update(settings)
    return Preset(_whole(table, parts), each)


def _whole(table: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a table, after those it is like."""
    found: dict[str, Any] = {}
    for name in table.get("like", ()):
        found |= _whole(parts[name], parts)
    own = {"like", "each", "methods"}
    return found | {name: value for name, value in table.items() if name not in own}
