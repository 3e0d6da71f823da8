"""The JSON spec of each rule that the flags name, for `metalstm.rules.build_rule`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.learned_optimizer.options import Config, rule_options

Spec = dict[str, Any]


def rule_spec(name: str, config: Config) -> Spec:
    """The spec of one of `experiments.learned_optimizer.options.RULES`."""
    options = config.rule
    gates: Spec = {
        "forget_bias": list(options.forget_bias),
        "input_bias": list(options.input_bias),
    }
    base = name.removesuffix("-f1")
    if base != name:
        gates["forget"] = "one"
    spec: Spec
    if base == "l2l-published":
        spec = {"rule": "l2l"}
    elif base == "l2l":
        spec = {
            "rule": "l2l",
            "hidden_size": options.hidden,
            "num_layers": options.lstm_layers,
            "output_scale": options.output_scale,
            "features": options.features,
        }
        if options.features == "moments":
            spec |= {"shortcut": options.shortcut, "relative": options.relative}
    elif base == "v2":
        memory = {"hidden_size": options.hidden}
        spec = {"rule": "two_layer", "memory": memory, "gates": gates}
    elif base in ("meta-lstm", "gates"):
        hidden = options.hidden if base == "meta-lstm" else 0
        spec = {"rule": "lstm_gates", "hidden_size": hidden, **gates}
    else:
        spec = {"rule": "learned_sgd"}
    spec = _merged(spec, rule_options(config).get(name, {}))
    if base in ("meta-lstm", "gates") and options.gradient_factor != 1:
        # a learned rate with its sign reversed leaves a gradient a gradient
        factor = {"rule": "learned_sgd", "rate": -options.gradient_factor}
        spec = {"rule": "chain", "parts": [factor, spec]}
    if options.separate == "none":
        return spec
    labels = options.separate.replace("-", "_")
    groups = dict.fromkeys(labels.split("_or_"), spec)
    return {"rule": "by_group", "labels": labels, "groups": groups}


def _merged(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    out = dict(spec)
    for key, value in changes.items():
        inner = out.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _merged(inner, value)
        out[key] = value
    return out
