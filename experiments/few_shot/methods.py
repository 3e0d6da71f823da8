"""The methods: what each is called and how its JSON spec follows from the flags.

A method is added by its factory in `metalstm.algorithms`, its name in `metalstm.runs`
and one row of `METHODS`. No jax here: the command line reads the table for its --help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.few_shot.options import Config, with_flags

Spec = dict[str, Any]

# Families, in the order and with the names that figures and tables use.
GRADIENT, HAND_MADE, METRIC = "gradient-based", "hand-made rule", "metric-based"
MEMORY, TRANSFER, FLOOR = "memory, imagination", "transfer", "floor"


class Method(NamedTuple):
    help: str
    family: str
    build: Callable[[Config], Spec]  # all of the spec but its way
    learns_init: bool = False  # hand-made rules can start from its theta_0
    # that tuning starts from; the grid grows by itself when the best is at its edge
    rates: tuple[float, ...] = ()


def config_for(config: Config, method: str) -> Config:
    """The flags as one method reads them: with its own in place of the common ones.

    A hand-made rule adapts the learner of the method whose theta_0 it starts from, in
    the same inner loop; of its own flags those of the rate and the steps count.

    Raises:
      ValueError: a method has a flag of its own that all must share.
    """
    donor = theta_donor(config.methods.algorithms)
    own = config.own.get(method, {})
    if METHODS[method].family == HAND_MADE and donor is not None:
        learner = vars(config.learner)
        own = {name: value for name, value in own.items() if name not in learner}
        own = config.own.get(donor, {}) | own
    shared = sorted(own.keys() & COMMON)
    if shared:
        raise ValueError(
            f"own settings of {method}: {shared[0]} is the same for all methods of a "
            "table; set it for the whole run"
        )
    return with_flags(dataclasses.replace(config, own={}), **own)


# What defines the test, the same for every method of a table.
COMMON = frozenset(
    "dataset data_dir split image_size way shot queries normalise algorithms "
    "test_episodes test_batch test_seed preset seed seeds workdir resume evaluate "
    "tensorboard debug".split()
)


def theta_donor(methods: Sequence[str]) -> str | None:
    """The method whose learned theta_0 the hand-made rules start from."""
    return next((name for name in methods if METHODS[name].learns_init), None)


def method_specs(config: Config, num_classes: int = 2) -> dict[str, Spec]:
    """One spec a method, in the order of --algorithms.

    ``num_classes``: of the meta-train split, which the transfer floors pre-train on.
    """
    return {
        name: method_spec(name, config_for(config, name), num_classes)
        for name in config.methods.algorithms
    }


def method_spec(name: str, config: Config, num_classes: int) -> Spec:
    """The spec of a method from the flags as it reads them."""
    method = METHODS[name]
    spec = method.build(config) | {"way": config.data.way}
    if method.family == TRANSFER:
        # turned characters are classes of their own
        turns = 4 if config.data.rotations else 1
        spec["algorithm"]["options"]["num_classes"] = turns * num_classes
    return spec


class Pretraining(NamedTuple):
    """What several transfer floors share."""

    spec: Spec
    config: Config


def pretrainings(
    config: Config, specs: dict[str, Spec]
) -> tuple[dict[str, Pretraining], dict[str, str]]:
    """The classifiers to pre-train, by name, and which of them each floor uses.

    Floors share one if they agree on the classifier, its data and its budget. It is
    validated by the comparison that costs least.
    """
    wanted: dict[str, Pretraining] = {}
    used: dict[str, str] = {}
    for name, spec in specs.items():
        options = spec["algorithm"].get("options", {})
        if spec["algorithm"]["name"] not in ("fine_tuning", "pretrained_features"):
            continue
        kind = options.get("classifier", "linear")
        compare = "cosine" if kind == "cosine" else "centroid"
        own = {n: options[n] for n in ("num_classes", "batch_size") if n in options}
        own |= {"compare": compare, "classifier": kind}
        algorithm = {"name": "pretrained_features", "options": own}
        mine = Pretraining(spec | {"algorithm": algorithm}, config_for(config, name))
        number, called = 1, f"pretrained-{kind}"
        while called in wanted and not _same_pretraining(wanted[called], mine):
            number += 1
            called = f"pretrained-{kind}-{number}"
        wanted.setdefault(called, mine)
        used[name] = called
    return wanted, used


def _same_pretraining(a: Pretraining, b: Pretraining) -> bool:
    shots = a.config.methods.train_shots, b.config.methods.train_shots
    parts = [(p.spec, p.config.data, p.config.learner, p.config.budget) for p in (a, b)]
    return parts[0] == parts[1] and shots[0] == shots[1]


def _comparing(constructor: str, **own: Any) -> Callable[[Config], Spec]:
    """Methods that compare embeddings: the constructor and its options."""

    def build(config: Config) -> Spec:
        options = own | {"train_way": config.methods.train_way or config.data.way}
        options |= {"train_queries": config.data.train_queries}
        if constructor == "hallucination":
            options["num_generated"] = config.methods.imagined
        spec: Spec = {"learner": _learner(config)}
        spec["algorithm"] = {"name": constructor, "options": options}
        if constructor == "relation":
            spec |= _relation(config)
        return spec

    return build


def _transfer(constructor: str, **own: Any) -> Callable[[Config], Spec]:
    """Transfer floors. Those with the same classifier share their pre-training."""

    def build(config: Config) -> Spec:
        options = dict(own)
        if config.methods.pretrain_batch is not None:
            options["batch_size"] = config.methods.pretrain_batch
        if constructor == "fine_tuning":
            options["num_steps"] = config.methods.finetune_steps
        algorithm = {"name": constructor, "options": options}
        return {"learner": _learner(config), "algorithm": algorithm}

    return build


def _adapting(constructor: str) -> Callable[[Config], Spec]:
    """Methods that adapt a learner with a rule of their own."""

    def build(config: Config) -> Spec:
        methods = config.methods
        options, rate = _inner_loop(config), methods.inner_rate
        spec: Spec = {"learner": _learner(config)}
        if constructor == "reptile":
            options |= {"rule": methods.adam_rate}
            options |= {"test_batch_size": options["batch_size"]}
            options |= {"batch_size": methods.train_batch}
            options |= {"train_shots": methods.train_shots}
            spec["outer_step"] = methods.outer_step
        elif constructor == "implicit_maml":
            options |= {"rule": rate, "strength": methods.proximal}
        else:
            options["rate"] = [rate, rate] if constructor == "meta_sgd" else rate
        return spec | {"algorithm": {"name": constructor, "options": options}}

    return build


def _hand_made(name: str) -> Callable[[Config], Spec]:
    def build(config: Config) -> Spec:
        options = _inner_loop(config) | {"second_order": False, "trainable": False}
        algorithm = {"name": "learned_init", "options": options}
        learner = _learner(config)
        return {"learner": learner, "rule": _optimizer(name), "algorithm": algorithm}

    return build


def _meta_lstm(config: Config) -> Spec:
    methods = config.methods
    options = _inner_loop(config) | {"second_order": methods.order == "second"}
    options |= {"learn_init": not methods.draw_init}
    options["support_stats"] = methods.support_stats or "moving"
    if methods.gradient_scale == "batch":
        options["gradient_scale"] = "1/batch"
    return {
        "learner": _learner(config),
        "rule": {"name": "lstm_gates", "options": _gates(config)},
        "algorithm": {"name": "meta_lstm", "options": options},
    }


def _first_order_meta_lstm(config: Config) -> Spec:
    spec = _meta_lstm(config)
    spec["algorithm"]["options"]["second_order"] = False
    return spec


def _learned_sgd(config: Config) -> Spec:
    methods = config.methods
    steps = max(methods.steps, methods.test_steps or 0)
    rule = {"rate": methods.inner_rate, "per": "tensor", "num_steps": steps}
    options = _inner_loop(config) | {"second_order": methods.order == "second"}
    return {
        "learner": _learner(config),
        "rule": {"name": "learned_sgd", "options": rule},
        "algorithm": {"name": "learned_init", "options": options},
    }


def _gradient_agreement(config: Config) -> Spec:
    weighed = METHODS[config.methods.agreement_of].build(config)
    algorithm = weighed["algorithm"]
    options = algorithm["options"] | {"of": algorithm["name"]}
    return weighed | {"algorithm": {"name": "gradient_agreement", "options": options}}


def _mann(config: Config) -> Spec:
    options = {"train_queries": config.data.train_queries}
    options |= {"num_slots": config.methods.memory_slots}
    options |= {"hidden_size": config.methods.memory_hidden}
    algorithm = {"name": "mann", "options": options}
    return {"learner": _learner(config), "algorithm": algorithm}


def _scratch(config: Config) -> Spec:
    options: Spec = {"num_steps": config.methods.scratch_steps}
    if config.methods.query_norm != "frozen":  # nothing is gathered here
        options["query_norm"] = config.methods.query_norm
    algorithm = {"name": "from_scratch", "options": options}
    learner = _learner(config)
    return {"learner": learner, "rule": _optimizer("sgd"), "algorithm": algorithm}


def _nearest_neighbour(config: Config) -> Spec:
    del config
    return {"algorithm": {"name": "nearest_neighbour"}}


def _learner(config: Config) -> Spec:
    spec = _body(config)
    return spec | {"tied_head": True} if config.learner.tied_head else spec


def _body(config: Config) -> Spec:
    options = config.learner
    shared = {
        "norm": options.norm,
        "scale_init": options.scale_init,
        "initializer": options.initializer,
        "zero_head": options.zero_head,
        "momentum": options.norm_momentum,
    }
    if options.learner == "mlp":
        kept = {name: shared[name] for name in ("initializer", "zero_head")}
        return {"name": "mlp", "options": kept | {"widths": list(options.widths)}}
    if options.learner == "resnet12":
        first = options.filters
        widths = [first, first * 5 // 2, first * 5, first * 10]
        return {"name": "resnet12", "options": shared | {"widths": widths}}
    own = {
        "filters": options.filters,
        "num_blocks": options.blocks,
        "downsample": "stride" if options.strided else "max_pool",
        "final_relu": options.final_relu,
    }
    return {"name": "conv4", "options": shared | own}


def _relation(config: Config) -> Spec:
    """Feature maps, halved twice as published, and the network that compares them."""
    learner, options = _learner(config), config.learner
    if learner["name"] == "conv4":
        learner["options"] |= {"feature_maps": True}
        learner["options"] |= {"num_halvings": min(2, options.blocks)}
    net = {
        "filters": options.filters,
        "norm": options.norm,
        "scale_init": options.scale_init,
        "initializer": options.initializer,
    }
    return {"learner": learner, "relation_net": net}


def _inner_loop(config: Config) -> dict[str, Any]:
    methods = config.methods
    options: dict[str, Any] = {
        "num_steps": methods.steps,
        "num_test_steps": methods.test_steps,
        "query_norm": methods.query_norm,
        "train_query_norm": methods.train_query_norm,
        "support_stats": methods.support_stats or "final",
        "batch_size": methods.support_batch,
        "train_queries": config.data.train_queries,
    }
    if config.learner.tied_head:
        options["train_way"] = methods.train_way or config.data.way
    options["gradient_scale"] = "way" if methods.gradient_scale == "way" else 1.0
    if methods.task_mapping is not None:
        options["task_mapping"] = methods.task_mapping
    return options


def _gates(config: Config) -> dict[str, Any]:
    rule = config.rule
    head = rule.head_input_bias
    return {
        "hidden_size": rule.hidden,
        "variant": rule.variant,
        "forget": rule.forget,
        "input": rule.input,
        "loss_input": rule.loss_input,
        "theta_input": rule.theta_input,
        "carry_input": rule.carry_input,
        "feature_gradient": rule.features,
        "forget_bias": list(rule.forget_bias),
        "input_bias": list(rule.input_bias),
        "input_bias_of": None if head is None else {"head": list(head)},
        "bias_per": rule.bias_per,
        "num_bias_steps": max(config.methods.steps, config.methods.test_steps or 0),
    }


def _optimizer(name: str) -> Spec:
    options: dict[str, Any] = {"learning_rate": 0.01}
    if name == "momentum":
        options["momentum"] = 0.9
    return {"name": name, "options": options}


_FINE_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)

METHODS: dict[str, Method] = {
    "meta-lstm": Method(
        "gates that mix parameters and gradients, learned with theta_0",
        GRADIENT,
        _meta_lstm,
        learns_init=True,
    ),
    "fo-meta-lstm": Method(
        "the same, first order whatever --order says",
        GRADIENT,
        _first_order_meta_lstm,
        True,
    ),
    "maml": Method(
        "theta_0 learned, fixed SGD, second order", GRADIENT, _adapting("maml"), True
    ),
    "fomaml": Method("the same, first order", GRADIENT, _adapting("fomaml"), True),
    "anil": Method(
        "MAML that adapts the head alone", GRADIENT, _adapting("anil"), True
    ),
    "reptile": Method(
        "theta_0 moves towards where the inner loop ends",
        GRADIENT,
        _adapting("reptile"),
        True,
    ),
    "imaml": Method(
        "theta_0 pulls during the inner loop, implicit gradient",
        GRADIENT,
        _adapting("implicit_maml"),
        True,
    ),
    "gradient-agreement": Method(
        "--agreement-of, tasks weighed by how their gradients agree",
        GRADIENT,
        _gradient_agreement,
        True,
    ),
    "meta-sgd": Method(
        "theta_0 and a rate for every parameter learned",
        GRADIENT,
        _adapting("meta_sgd"),
        True,
    ),
    "learned-sgd": Method(
        "theta_0 and a rate for every tensor and step learned",
        GRADIENT,
        _learned_sgd,
        True,
    ),
    "prototypical": Method(
        "distance to mean embeddings", METRIC, _comparing("prototypical")
    ),
    "prototypical-cosine": Method(
        "cosine with mean embeddings, scale learned",
        METRIC,
        _comparing("prototypical", distance="cosine"),
    ),
    "matching": Method(
        "attention over support images by cosine, scale learned",
        METRIC,
        _comparing("matching"),
    ),
    "matching-euclidean": Method(
        "the same by squared distance",
        METRIC,
        _comparing("matching", distance="euclidean"),
    ),
    "matching-fce": Method(
        "the same by cosine of full context embeddings",
        METRIC,
        _comparing("matching", context_steps=3),
    ),
    "relation": Method(
        "a network compares feature maps, squared error",
        METRIC,
        _comparing("relation"),
    ),
    "relation-softmax": Method(
        "the same, cross-entropy over classes",
        METRIC,
        _comparing("relation", loss="cross_entropy"),
    ),
    "siamese": Method(
        "nearest embedding, learned from pairs", METRIC, _comparing("siamese")
    ),
    "siamese-triplet": Method(
        "nearest embedding, learned from triplets",
        METRIC,
        _comparing("siamese", loss="triplet"),
    ),
    "am-softmax": Method(
        "cosine of features pre-trained with a margin of cosines",
        TRANSFER,
        _transfer("margin_classifier", loss="am_softmax"),
    ),
    "arcface": Method(
        "the same with a margin of angles",
        TRANSFER,
        _transfer("margin_classifier", loss="arcface"),
    ),
    "sphereface": Method(
        "the same with multiplied angles",
        TRANSFER,
        # a fixed scale: with their own length, features shrank and learned little
        _transfer("margin_classifier", loss="sphereface", scale=30.0),
    ),
    "sgd": Method(
        "SGD from the first learned theta_0 of the list, rate tuned on validation",
        HAND_MADE,
        _hand_made("sgd"),
        rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "momentum": Method(
        "likewise",
        HAND_MADE,
        _hand_made("momentum"),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "adagrad": Method(
        "likewise",
        HAND_MADE,
        _hand_made("adagrad"),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    ),
    "adadelta": Method(
        "likewise",
        HAND_MADE,
        _hand_made("adadelta"),
        rates=(0.3, 1.0, 3.0, 10.0, 30.0),
    ),
    "adam": Method(
        "likewise",
        HAND_MADE,
        _hand_made("adam"),
        rates=(0.0003, 0.001, 0.003, 0.01, 0.03),
    ),
    "scratch": Method(
        "a fresh learner trained on the support set, rate tuned on validation",
        FLOOR,
        _scratch,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "hallucination": Method(
        "prototypical, with support examples imagined by a generator",
        MEMORY,
        _comparing("hallucination"),
    ),
    "mann": Method(
        "a network that writes the support set to an external memory", MEMORY, _mann
    ),
    "feature-neighbour": Method(
        "the closest support image in pre-trained features",
        TRANSFER,
        _transfer("pretrained_features", compare="neighbour"),
    ),
    "feature-centroid": Method(
        "the closest class mean in pre-trained features",
        TRANSFER,
        _transfer("pretrained_features", compare="centroid"),
    ),
    "feature-cosine": Method(
        "the class mean of largest cosine in pre-trained features",
        TRANSFER,
        _transfer("pretrained_features", compare="cosine"),
    ),
    "finetune-head": Method(
        "a new head on pre-trained features, rate and steps tuned",
        TRANSFER,
        _transfer("fine_tuning", tune="head"),
        rates=_FINE_RATES,
    ),
    "finetune-all": Method(
        "the whole pre-trained network, rate and steps tuned",
        TRANSFER,
        _transfer("fine_tuning", tune="all"),
        rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    ),
    "baseline++": Method(
        "finetune-head with cosines for scores, also in pre-training",
        TRANSFER,
        _transfer("fine_tuning", tune="head", classifier="cosine"),
        rates=_FINE_RATES,
    ),
    "nearest-neighbour": Method(
        "the closest support image in pixels", FLOOR, _nearest_neighbour
    ),
}
LEARNS_INIT = tuple(name for name, method in METHODS.items() if method.learns_init)
