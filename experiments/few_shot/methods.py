"""The methods: names, families, options, and the specs that options make.

A method's options are the arguments of its constructor in `metalstm.algorithms`, read
from its source: no jax here, so that --help is quick. A method is added by its
constructor, its name in `metalstm.specs`, and a row of methods.toml.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from experiments.common import cli
from experiments.common.cli import Count, Flat, Natural, Pair, Positive, said
from experiments.common.constructors import options_of as constructor_options
from experiments.common.dotted import import_object
from experiments.common.saved_options import from_json, read_config
from experiments.few_shot.options import Common, Data, Options, Training, with_methods

GRADIENT, METRIC = "gradient-based", "metric-based"
HAND_MADE, BASELINE = "hand-made rule", "baseline"
Spec = dict[str, Any]

_TABLE = tomllib.loads(Path(__file__).with_name("methods.toml").read_text())
_KINDS, _MORE = _TABLE.pop("options"), _TABLE.pop("more")
# Arguments that follow from other options, and those that no comparison needs.
_OMIT = (
    "learner", "rule", "relation_net", "algorithm", "num_classes", "way",
    "differentiation", "learn_init", "trainable", "train_shots", "gradient_weights",
    "scan_unroll", "axis_name", "num_bias_steps",
)  # fmt: skip
# Types with the limits that the constructors check, or of options that JSON can hold.
_TYPES: dict[str, Any] = {
    "num_slots": Pair,
    "train_way": Pair | None,
    "rate": Positive,
    "adam_rate": Positive,
    "outer_step": Positive,
    "strength": Positive,
    "input_bias_of": tuple[tuple[str, float, float], ...],
    "learn_init": bool,
    "last": Count | None,
    "keep": Literal["all", "remat", "mixed", "segments"] | None,
    "order": Literal["first", "second"],
    "rule": str,
    "of": Literal["maml", "fomaml", "reptile"],
    "optimizer": Literal["sgd", "momentum", "adagrad", "adadelta", "adam"],
}
# Methods mean different things by these: no flag for all methods sets them.
_OF_ONE_METHOD = {
    "optimizer", "loss", "distance", "context_steps", "compare", "classifier", "tune",
    "scale", "margin",
}  # fmt: skip
_OF_INNER_LOOPS = {"num_steps", "batch_size", "hidden_size"}  # else of one method too

Gates: Any = constructor_options(
    "rules/__init__.py",
    "lstm_gates",
    omit=_OMIT,
    types=_TYPES | {"hidden_size": Natural | None},
    defaults={
        "hidden_size": 4,
        "forget_bias": (7.0, 7.0),
        "input_bias": (2.0, 2.0),
        "input_bias_of": (),
    },
    integer=Count,
)
NETWORKS = ("conv4", "mlp", "resnet12")
_NETWORK = "--help NAME has its options; or MODULE:NAME of your own flax module."
_HEAD = "All classes start from one learned vector: any --way in training and test."
_LENGTH = "Scale features to this norm before a tied head; default: as they are."
LEARNERS: dict[str, Any] = {
    name: constructor_options(
        "nn/networks.py",
        {"conv4": "Conv4", "mlp": "MLP", "resnet12": "ResNet12"}[name],
        omit=(
            "num_classes", "epsilon", "activation", "num_halvings", "feature_maps",
            "method", "drop_rate", "drop_block",
        ),
        defaults={"initializer": "torch"} | defaults,
        more=[
            ("learner", said(Literal[NETWORKS], _NETWORK), name),
            ("tied_head", said(bool, _HEAD), False),
            ("feature_length", said(Positive | None, _LENGTH), None),
        ],
        integer=Count,
    )
    for name, defaults in {
        "conv4": {},
        "mlp": {},
        "resnet12": {"momentum": 0.05, "widths": (32, 80, 160, 320)},
    }.items()
}  # fmt: skip


class UserNetwork(cli.Options, frozen=True):
    """A network of one's own: a flax module, or a function that makes one."""

    learner: str
    """MODULE:NAME, such as mymodule:CNN, of what Python finds from the current
    directory. An argument num_classes is given the number of outputs, None for the
    features alone."""
    tied_head: said(bool, _HEAD) = False  # type: ignore[valid-type]
    feature_length: said(Positive | None, _LENGTH) = None  # type: ignore[valid-type]

    norm: ClassVar[str] = "batch"  # as far as can be known


def learner_options(learner: str) -> Any:
    """The options of a network by name, or by the path of a user's.

    Raises:
      ValueError: the path cannot be imported.
    """
    if ":" not in learner:
        return LEARNERS[learner]()
    import_object("--learner", learner)
    return UserNetwork(learner)


class Method(NamedTuple):
    family: str
    about: str
    default: Any  # options
    rates: tuple[float, ...]  # the grid that tuning starts from

    @property
    def learns_init(self) -> bool:
        """Whether hand-made rules can start from its theta_0."""
        return self.family == GRADIENT


@functools.cache
def _options_class(kind: str) -> Any:
    row = _KINDS[kind]
    defaults = {n: entry.get("default") for n, entry in _MORE.items()}
    defaults |= {"num_steps": 5, "train_way": None, **row.get("defaults", {})}
    more = [
        (name, said(_TYPES[name], _MORE[name]["help"]), defaults[name])
        for name in row.get("more", ())
    ]
    if row.get("gates"):
        more.append(("rule", Flat[Gates], Gates()))  # type: ignore[misc]
    return constructor_options(
        "algorithms/__init__.py",
        *row["from"],
        omit=_OMIT,
        types=_TYPES,
        defaults=row.get("defaults", {})
        | {n: defaults[n] for n in ("num_steps", "train_way")},
        more=more,
        integer=Count,
        namespace={"kind": kind, "constructor": row["from"][0]},
    )


METHODS = {
    name: Method(
        family,
        row["about"],
        _options_class(row["options"])(**row.get("with", {})),
        tuple(row.get("rates", ())),
    )
    for family, rows in _TABLE.items()
    for name, row in rows.items()
}
LEARNS_INIT = tuple(name for name, method in METHODS.items() if method.learns_init)


def init_source(methods: Sequence[str]) -> str | None:
    """The method whose learned theta_0 the hand-made rules start from."""
    return next((name for name in methods if METHODS[name].learns_init), None)


def moves_theta(method: Any) -> bool:
    """Whether theta_0 goes a share of the way to theta_T, as in reptile."""
    return "reptile" in (method.constructor, getattr(method, "of", None))


def is_inner_loop(method: Any) -> bool:
    """Whether these are options of a method that adapts its learner by updates."""
    return hasattr(method, "num_test_steps")


def of_one_method(method: Any) -> set[str]:
    """The options that a flag without the method's name does not set."""
    return _OF_ONE_METHOD | (set() if is_inner_loop(method) else _OF_INNER_LOOPS)


@functools.cache
def kind_of(method: str, learner: str) -> Any:
    """The class of all options of a method, for a network by name."""
    parts = {
        "method": METHODS[method].default,
        "learner": learner_options(learner),
        "training": Training(),
    }
    fields = [(part, Flat[type(value)], value) for part, value in parts.items()]  # type: ignore[misc]
    name = f"{method.title()}{learner.title()}".replace(":", "")
    return msgspec.defstruct(name, fields, frozen=True)


def options_of(folder: Path) -> Options:
    """The options of a run folder.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its config.json is damaged.
    """
    saved, path = read_config(folder)["config"], str(folder / "config.json")
    common = from_json(Common, saved, path)
    methods: dict[str, Any] = {}
    try:
        for name, own in saved["methods"].items():
            kind = kind_of(name, own["learner"]["learner"])
            methods[name] = from_json(kind, own, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no methods that exist ({type(error).__name__}: {error}): "
            "put a copy of the file back, or start again"
        ) from None
    return with_methods(common, methods)


# -- specs -----------------------------------------------------------------------------


def spec_of(options: Any, data: Data, num_classes: int = 2) -> Spec:
    """What `metalstm.specs.build_algorithm` builds a method from.

    Args:
      options: of `kind_of`.
      num_classes: of the meta-train split, which transfer methods pre-train on.
    """
    own, learner, training = options.method, options.learner, options.training
    row, given = _KINDS[own.kind], msgspec.structs.asdict(own)
    spec: Spec = {"algorithm": own.constructor}
    if own.kind == "gradient_agreement":
        kind = _options_class(given.pop("of"))
        weighed = kind(**{n: given[n] for n in kind.__struct_fields__ if n in given})
        options = msgspec.structs.replace(options, method=weighed)
        of = spec_of(options, data, num_classes)
        return spec | {"of": of, "task_mapping": own.task_mapping}
    features = row.get("features", False)
    if own.kind != "nearest_neighbour":
        spec["learner"] = _learner_spec(learner, None if features else data.way)
    if "train_way" in given and (features or learner.tied_head):
        given["train_way"] = own.train_way or data.way
    order = given.pop("order", row.get("order"))
    how = {n: given.pop(n) for n in ("keep", "last") if n in given}
    if order is not None:
        spec["differentiation"] = {"order": order, **how}
    steps = max(given.get("num_steps", 0), given.get("num_test_steps") or 0)
    match own.kind:
        case "meta_lstm" | "fo_meta_lstm":
            rule = msgspec.structs.asdict(own.rule) | {"num_bias_steps": steps}
            ranges = {part: (low, high) for part, low, high in own.rule.input_bias_of}
            rule["input_bias_of"] = ranges or None
            given["rule"] = {"rule": "lstm_gates", **rule}
        case "learned_sgd":
            rule = {"rule": "learned_sgd", "per": "tensor", "num_steps": steps}
            given["rule"] = rule | {"rate": given.pop("rate")}
        case "learned_rule":
            if ":" in own.rule:
                import_object("--rule", own.rule)
            given["rule"] = {"rule": own.rule}
        case "meta_sgd":
            given["rate"] = (own.rate, own.rate)
        case "implicit_maml":
            given["rule"] = given.pop("rate")
        case "reptile":
            given["rule"] = given.pop("adam_rate")
            del given["outer_step"]
            given["train_shots"] = training.train_shots
        case "hand_made":
            given["rule"] = {"rule": given.pop("optimizer"), "learning_rate": 0.01}
            if own.optimizer == "momentum":
                given["rule"]["momentum"] = 0.9
            given["trainable"] = False
        case "from_scratch":
            given["rule"] = {"rule": "sgd", "learning_rate": 0.01}
            if own.query_norm == "frozen":  # nothing is gathered here
                given["query_norm"] = "support"
        case "mann":
            given["way"] = data.way
        case "relation":
            shared = ("filters", "norm", "scale_init", "initializer")
            of_net = {n: getattr(learner, n, getattr(_CONV4, n)) for n in shared}
            given["relation_net"] = {"learner": "relation_net", **of_net}
            if learner.learner == "conv4":
                # feature maps, halved twice as published
                maps = {"num_halvings": min(2, learner.num_blocks)}
                spec["learner"] |= {"feature_maps": True, **maps}
        case "margin_classifier" | "pretrained_features" | "fine_tuning":
            turns = 4 if training.rotations else 1  # rotated ones are classes
            given["num_classes"] = turns * num_classes
    return spec | given


_CONV4 = LEARNERS["conv4"]()


def _learner_spec(learner: Any, way: int | None) -> Spec:
    """The network with a head for so many classes, or None: up to its features."""
    options = msgspec.structs.asdict(learner)
    tied = options.pop("tied_head") and way is not None
    length = options.pop("feature_length")
    body = {"num_classes": None if tied else way, **options}
    if not tied:
        return body
    return {"learner": "tied_head", "body": body, "feature_length": length}


def specs_of(options: Options, num_classes: int = 2) -> dict[str, Spec]:
    methods = options.methods.items()
    return {name: spec_of(own, options.data, num_classes) for name, own in methods}


class Pretraining(NamedTuple):
    """What several transfer methods share."""

    spec: Spec
    options: Any


def pretrainings(
    options: Options, specs: Mapping[str, Spec]
) -> tuple[dict[str, Pretraining], dict[str, str]]:
    """The classifiers to pre-train, by name, and which of them each method uses.

    Methods share one if they agree on the classifier, its data and its budget. It is
    validated by the comparison that costs least.
    """
    wanted: dict[str, Pretraining] = {}
    used: dict[str, str] = {}
    for name, spec in specs.items():
        if spec["algorithm"] not in ("fine_tuning", "pretrained_features"):
            continue
        own, kind = options.methods[name], spec["classifier"]
        shared = _options_class("pretrained_features")(
            compare="cosine" if kind == "cosine" else "centroid",
            classifier=kind,
            **{
                name: getattr(own.method, name)
                for name in ("batch_size", "per_class", "centroid_weight")
            },
        )
        own = kind_of("feature-centroid", own.learner.learner)(
            shared, own.learner, own.training
        )
        common = {n: spec[n] for n in ("learner", "num_classes")}
        mine = Pretraining(
            {"algorithm": "pretrained_features", **common}
            | msgspec.structs.asdict(shared),
            own,
        )
        number, called = 1, f"pretrained-{kind}"
        while called in wanted and wanted[called] != mine:
            number += 1
            called = f"pretrained-{kind}-{number}"
        wanted.setdefault(called, mine)
        used[name] = called
    return wanted, used
