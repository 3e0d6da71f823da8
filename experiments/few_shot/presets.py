"""Named recipes: presets.toml, read into settings for all methods and for each."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.cli import check_names


class Preset(NamedTuple):
    shared: Mapping[str, Any] = {}  # option -> value, for every method that has it
    each: Mapping[str, Mapping[str, Any]] = {}  # method or family -> option -> value

    def of(self, method: str, family: str) -> dict[str, Any]:
        return {**self.each.get(family, {}), **self.each.get(method, {})}


def preset(name: str) -> Preset:
    """Return the settings of a named recipe.

    Raises:
      ValueError: there is no such preset.
    """
    check_names("--preset", [name], read_presets())
    return read_presets()[name]


@functools.cache
def read_presets() -> dict[str, Preset]:
    document = tomllib.loads(Path(__file__).with_name("presets.toml").read_text())
    parts, presets = document["parts"], {}
    for preset, table in document["presets"].items():
        each: dict[str, dict[str, Any]] = {}
        for entry in table.get("each", ()):
            for name in entry["methods"]:
                each.setdefault(name, {}).update(_settings(entry, parts))
        presets[preset] = Preset(_settings(table, parts), each)
    return presets


def _settings(table: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a table, after those it is like."""
    found: dict[str, Any] = {}
    for name in table.get("like", ()):
        found |= _settings(parts[name], parts)
    other = {"like", "each", "methods"}
    return found | {name: value for name, value in table.items() if name not in other}
