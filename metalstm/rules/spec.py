"""Rules by name: a spec is plain data, from which a rule is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from metalstm.base import UpdateRule
from metalstm.records import Record
from metalstm.rules.classic import as_rule, chain, learned_scale, learned_sgd
from metalstm.rules.gates import lstm_gates
from metalstm.rules.groups import by_group, conv_or_dense, matrix_or_vector
from metalstm.rules.l2l_lstm import l2l
from metalstm.rules.memory import gradient_memory, two_layer
from metalstm.rules.tensor_rules import moment_gates, moment_lstm, moment_network
from metalstm.user_objects import maker_at

__all__ = ["FACTORIES", "build_rule"]

_MAX_DEPTH = 8

FACTORIES: dict[str, Callable[..., UpdateRule]] = {
    "gradient_memory": gradient_memory,
    "l2l": l2l,
    "learned_scale": learned_scale,
    "learned_sgd": learned_sgd,
    "lstm_gates": lstm_gates,
    "moment_gates": moment_gates,
    "moment_lstm": moment_lstm,
    "moment_network": moment_network,
    "two_layer": two_layer,
}
_LABELS = {  # name -> the function, the labels it may give
    "conv_or_dense": (conv_or_dense, {"conv", "dense"}),
    "matrix_or_vector": (matrix_or_vector, {"matrix", "vector"}),
}


def build_rule(spec: Mapping[str, Any]) -> UpdateRule:
    """Build a rule from JSON-like data.

    ``{"rule": "l2l", "hidden_size": 20}`` is ``l2l(hidden_size=20)``, and likewise for
    all of `FACTORIES`. ``{"rule": "chain", "parts": [spec, ..]}`` is a chain, of which
    a part may be a rule or an optax transform too; ``{"rule": "by_group", "labels":
    "conv_or_dense" or "matrix_or_vector", "groups": {label: spec}}`` gives each group a
    rule.
    ``{"rule": "mymodule:my_rule", ..}`` is a rule of one's own: an `UpdateRule` or an
    optax transform, or a function whose return annotation is one of these, in a module
    that is imported already. A spec may come from a file: it imports nothing, and calls
    no other function.

    Raises:
      ValueError: no such rule, or arguments that it does not take.
    """
    return _build(spec, 0)


def _build(spec: Any, depth: int) -> UpdateRule:
    if isinstance(spec, UpdateRule | optax.GradientTransformation):
        return as_rule(spec)  # a part of a chain that no file can hold, given again
    if not isinstance(spec, Mapping) or not isinstance(spec.get("rule"), str):
        raise ValueError(
            f"spec={_short(spec)}: give a dict with the rule's name, such as "
            '{"rule": "l2l"}'
        )
    if depth > _MAX_DEPTH:
        raise ValueError(f"spec nests more than {_MAX_DEPTH} rules: flatten its chains")
    name = spec["rule"]
    options = {key: value for key, value in spec.items() if key != "rule"}
    if name == "chain":
        _check_options(name, options, {"parts"})
        parts = options.get("parts")
        if not isinstance(parts, list | tuple):
            raise ValueError(f"chain takes parts=[spec, ..], not {_short(parts)}")
        return chain(*(_build(part, depth + 1) for part in parts))
    if name == "by_group":
        return _build_groups(options, depth)
    if ":" in name:
        return _build_users(name, options)
    if name not in FACTORIES:
        choices = ", ".join(sorted({*FACTORIES, "chain", "by_group"}))
        own = ":".join(name.rsplit(".", 1)) if "." in name else "MODULE:NAME"
        raise ValueError(
            f"there is no rule {_short(name)}: choose one of {choices}, or one of your "
            f"own by {own}"
        )
    factory = FACTORIES[name]
    _check_options(name, options, set(inspect.signature(factory).parameters))
    try:
        return factory(**{key: _tuples(value) for key, value in options.items()})
    except TypeError as error:  # an argument of a wrong type, or unknown further in
        raise ValueError(f"{name} cannot be built of {_short(options)}: {error}") from (
            error
        )


def _build_users(path: str, options: dict[str, Any]) -> UpdateRule:
    types = (UpdateRule, optax.GradientTransformation)
    found = maker_at(path, "rule", types)
    is_rule = isinstance(found, types)
    if is_rule and options:
        raise ValueError(
            f"rule {path!r} is a rule, which takes no {', '.join(options)}: name the "
            "function that makes it"
        )
    try:
        made = found if is_rule else found(**_tuples(options))
        rule = as_rule(made)
    except TypeError as error:
        raise ValueError(
            f"rule {path!r} cannot be built of {_short(options)}: {error}"
        ) from error
    record = Record("rule", path, options, rule)
    return rule._replace(made_by=record)


def _build_groups(options: dict[str, Any], depth: int) -> UpdateRule:
    _check_options("by_group", options, {"groups", "labels"})
    labels, groups = options.get("labels"), options.get("groups")
    if not isinstance(labels, str) or labels not in _LABELS:
        raise ValueError(
            f"by_group has labels={_short(labels)}: choose one of "
            f"{', '.join(sorted(_LABELS))}"
        )
    label_fn, names = _LABELS[labels]
    if not isinstance(groups, Mapping) or set(groups) != names:
        raise ValueError(
            f"by_group with labels={labels!r} takes groups={{label: spec}} for "
            f"{' and '.join(sorted(names))}, not {_short(groups)}"
        )
    built = {label: _build(part, depth + 1) for label, part in groups.items()}
    return by_group(built, label_fn)


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{name} takes no {', '.join(map(_short, unknown))}: it takes "
            f"{', '.join(sorted(known))}"
        )


def _tuples(value: Any) -> Any:
    """JSON has lists where the factories take tuples."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(x) for x in value)
    if isinstance(value, Mapping):
        return {key: _tuples(x) for key, x in value.items()}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + ".."
