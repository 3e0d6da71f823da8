"""Methods as plain data: a spec names constructors and holds their arguments.

``{"algorithm": "maml", "rate": 0.1, "learner": {"learner": "conv4", "num_classes":
5}}`` is ``algorithms.maml(nn.conv4(5), rate=0.1)``. A nested spec is known by its first
word: ``algorithm`` of `metalstm.algorithms`, ``learner`` of `metalstm.nn`, ``rule`` of
`metalstm.rules.build_rule` or an optimizer, ``order`` of `metalstm.inner`. Nothing in a
spec is ever evaluated or unpickled, and of a user's module it can call only what
declares that it makes a learner or a rule (`metalstm.user_objects`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax

from metalstm import algorithms, nn, rules
from metalstm.base import Learner, MetaAlgorithm, UpdateRule
from metalstm.checks import check_choice
from metalstm.inner import Differentiation, first_order, second_order
from metalstm.nn.named import learner_at

__all__ = [
    "COMPARING",
    "build_algorithm",
    "build_learner",
    "build_rule",
    "fixed_way",
    "learner_spec",
]

# methods on top of a learner's features: any way will do
COMPARING: dict[str, Callable[..., MetaAlgorithm]] = {
    "fine_tuning": algorithms.fine_tuning,
    "hallucination": algorithms.hallucination,
    "margin_classifier": algorithms.margin_classifier,
    "matching": algorithms.matching,
    "pretrained_features": algorithms.pretrained_features,
    "prototypical": algorithms.prototypical,
    "relation": algorithms.relation,
    "siamese": algorithms.siamese,
}
_ALGORITHMS: dict[str, Callable[..., MetaAlgorithm]] = COMPARING | {
    "anil": algorithms.anil,
    "fomaml": algorithms.fomaml,
    "from_scratch": algorithms.from_scratch,
    "gradient_agreement": algorithms.gradient_agreement,
    "implicit_maml": algorithms.implicit_maml,
    "learned_init": algorithms.learned_init,
    "logistic_regression": algorithms.logistic_regression,
    "maml": algorithms.maml,
    "mann": algorithms.mann,
    "meta_lstm": algorithms.meta_lstm,
    "meta_sgd": algorithms.meta_sgd,
    "nearest_centroid": algorithms.nearest_centroid,
    "nearest_neighbour": algorithms.nearest_neighbour,
    "published_meta_lstm": algorithms.published_meta_lstm,
    "reptile": algorithms.reptile,
    "ridge": algorithms.ridge,
}
_LEARNERS: dict[str, Callable[..., Learner]] = {
    "conv4": nn.conv4,
    "mlp": nn.mlp,
    "relation_net": nn.relation_net,
    "resnet12": nn.resnet12,
    "tied_head": nn.tied_head,
}
_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adadelta": optax.adadelta,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "momentum": optax.sgd,
    "sgd": optax.sgd,
}
_POSITIONAL = ("learner", "of", "body")  # a constructor's first argument


def build_algorithm(spec: Mapping[str, Any]) -> MetaAlgorithm:
    """Build a method from its spec.

    Raises:
      ValueError: a name that does not exist, or arguments that its constructor does
        not take.
    """
    return _call("algorithm", spec, _ALGORITHMS)


def build_learner(spec: Mapping[str, Any]) -> Learner:
    """Build a learner: conv4, mlp, resnet12, relation_net, or tied_head of a body.

    A name with a colon, such as ``mymodule:CNN``, is a user's network, whose module
    must be imported already: `metalstm.nn.named.learner_at`.
    """
    path = str(spec.get("learner")) if isinstance(spec, Mapping) else ""
    users = {path: functools.partial(learner_at, path)} if ":" in path else {}
    return _call("learner", spec, _LEARNERS | users)


def build_rule(spec: Mapping[str, Any]) -> UpdateRule:
    """Build a rule as `metalstm.rules.build_rule` does, or an optimizer by its name.

    An optimizer's learning rate is a parameter of the rule, so that a grid of rates
    needs one program.
    """
    if spec.get("rule") not in _OPTIMIZERS:
        return rules.build_rule(spec)
    options = _built(spec)
    factory = _OPTIMIZERS[options.pop("rule")]
    if "learning_rate" not in options:
        raise ValueError(f"rule={spec['rule']!r} has no learning_rate: give one")
    rate = options.pop("learning_rate")
    return rules.tunable(
        lambda learning_rate: factory(learning_rate, **options), learning_rate=rate
    )


def learner_spec(spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The spec of what a method adapts or embeds with; None: it has no learner."""
    return learner_spec(spec["of"]) if "of" in spec else spec.get("learner")


def fixed_way(spec: Mapping[str, Any]) -> int | None:
    """The number of classes that every task of a method must have; None: any."""
    if spec["algorithm"] == "mann":
        return spec["way"]
    return (learner_spec(spec) or {}).get("num_classes")


def _call(kind: str, spec: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{kind}={spec!r}: give a mapping, such as a JSON object")
    name = str(spec.get(kind))
    check_choice(kind, name, sorted(table))
    options = _built(spec)
    del options[kind]
    first = [options.pop(key) for key in _POSITIONAL if key in options]
    if kind == "learner" and "num_classes" in options:
        first.append(options.pop("num_classes"))
    try:
        return table[name](*first, **options)
    except TypeError as error:  # an argument of a wrong type, or unknown further in
        raise ValueError(f"{name} cannot be built of its spec: {error}") from error


def _built(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a spec, nested specs built, lists as tuples."""
    return {key: _value(value) for key, value in spec.items()}


def _value(value: Any) -> Any:
    if type(value) in (list, tuple):  # an optax transform is a tuple too
        # JSON has no tuples, and flax modules must be hashable
        return tuple(_value(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    for kind, build in _BUILDERS.items():
        if kind in value:
            return build(value)
    return {key: _value(part) for key, part in value.items()}


def _differentiation(spec: Mapping[str, Any]) -> Differentiation:
    options = {key: value for key, value in spec.items() if value is not None}
    order = options.pop("order")
    check_choice("order", order, ("first", "second"))
    return (first_order if order == "first" else second_order)(**options)


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "algorithm": build_algorithm,
    "rule": build_rule,
    "order": _differentiation,
    "learner": build_learner,
}
