"""The methods: names, families, defaults, and the specs that options make.

A method is added by its factory in `metalstm.algorithms`, its name in
`metalstm.specs`, a class of options in `experiments.few_shot.arguments`, and one row
of `METHODS`. No jax here: the command line reads the table for its --help.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple

from experiments.few_shot import arguments
from experiments.few_shot.arguments import Spec
from experiments.few_shot.options import LEARNERS, Conv4, Data, Options, Training

# Families, in the order and with the names that figures and tables use.
GRADIENT, HAND_MADE, METRIC = "gradient-based", "hand-made rule", "metric-based"
MEMORY, TRANSFER, BASELINE = "memory, imagination", "transfer", "baseline"


class Method(NamedTuple):
    about: str
    family: str
    default: arguments.Arguments
    learns_init: bool = False  # hand-made rules can start from its theta_0
    # that tuning starts from; the grid grows by itself when the best is at its edge
    rates: tuple[float, ...] = ()


def _method(
    about: str, family: str, default: arguments.Arguments, *rates: float
) -> Method:
    return Method(about, family, default, family == GRADIENT, rates)


_FINE = (0.003, 0.01, 0.03, 0.1, 0.3)
METHODS: dict[str, Method] = {
    "meta-lstm": _method(
        "gates that mix parameters and gradients, learned with theta_0",
        GRADIENT,
        arguments.MetaLstm(),
    ),
    "fo-meta-lstm": _method(
        "the same, first order whatever --order says",
        GRADIENT,
        arguments.FirstOrderMetaLstm(),
    ),
    "maml": _method(
        "theta_0 learned, fixed SGD, second order", GRADIENT, arguments.Maml()
    ),
    "fomaml": _method("the same, first order", GRADIENT, arguments.Fomaml()),
    "anil": _method("MAML that adapts the head alone", GRADIENT, arguments.Anil()),
    "reptile": _method(
        "theta_0 moves towards where the inner loop ends", GRADIENT, arguments.Reptile()
    ),
    "imaml": _method(
        "theta_0 pulls during the inner loop, implicit gradient",
        GRADIENT,
        arguments.ImplicitMaml(),
    ),
    "gradient-agreement": _method(
        "maml, fomaml or reptile, tasks weighed by how their gradients agree",
        GRADIENT,
        arguments.GradientAgreement(),
    ),
    "meta-sgd": _method(
        "theta_0 and a rate for every parameter learned", GRADIENT, arguments.MetaSgd()
    ),
    "learned-sgd": _method(
        "theta_0 and a rate for every tensor and step learned",
        GRADIENT,
        arguments.LearnedSgd(),
    ),
    "prototypical": _method(
        "distance to mean embeddings", METRIC, arguments.Prototypical()
    ),
    "prototypical-cosine": _method(
        "cosine with mean embeddings, scale learned",
        METRIC,
        arguments.Prototypical(distance="cosine"),
    ),
    "matching": _method(
        "attention over support images by cosine, scale learned",
        METRIC,
        arguments.Matching(),
    ),
    "matching-euclidean": _method(
        "the same by squared distance", METRIC, arguments.Matching(distance="euclidean")
    ),
    "matching-fce": _method(
        "the same by cosine of full context embeddings",
        METRIC,
        arguments.Matching(context_steps=3),
    ),
    "relation": _method(
        "a network compares feature maps, squared error", METRIC, arguments.Relation()
    ),
    "relation-softmax": _method(
        "the same, cross-entropy over classes",
        METRIC,
        arguments.Relation(loss="cross_entropy"),
    ),
    "siamese": _method(
        "nearest embedding, learned from pairs", METRIC, arguments.Siamese()
    ),
    "siamese-triplet": _method(
        "nearest embedding, learned from triplets",
        METRIC,
        arguments.Siamese(loss="triplet"),
    ),
    "am-softmax": _method(
        "cosine of features pre-trained with a margin of cosines",
        TRANSFER,
        arguments.MarginClassifier(),
    ),
    "arcface": _method(
        "the same with a margin of angles",
        TRANSFER,
        arguments.MarginClassifier(loss="arcface"),
    ),
    # a fixed scale: with their own length, features shrank and learned little
    "sphereface": _method(
        "the same with multiplied angles",
        TRANSFER,
        arguments.MarginClassifier(loss="sphereface", scale=30.0),
    ),
    "sgd": _method(
        "SGD from the first learned theta_0 of the list, rate tuned on validation",
        HAND_MADE,
        arguments.hand_made("sgd")(),
        0.003,
        0.01,
        0.03,
        0.1,
        0.3,
        1.0,
    ),
    "momentum": _method(
        "likewise",
        HAND_MADE,
        arguments.hand_made("momentum")(),
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
        0.3,
    ),
    "adagrad": _method(
        "likewise",
        HAND_MADE,
        arguments.hand_made("adagrad")(),
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
    ),
    "adadelta": _method(
        "likewise",
        HAND_MADE,
        arguments.hand_made("adadelta")(),
        0.3,
        1.0,
        3.0,
        10.0,
        30.0,
    ),
    "adam": _method(
        "likewise",
        HAND_MADE,
        arguments.hand_made("adam")(),
        0.0003,
        0.001,
        0.003,
        0.01,
        0.03,
    ),
    "scratch": _method(
        "a fresh learner trained on the support set, rate tuned on validation",
        BASELINE,
        arguments.Scratch(),
        0.01,
        0.03,
        0.1,
        0.3,
        1.0,
    ),
    "hallucination": _method(
        "prototypical, with support examples imagined by a generator",
        MEMORY,
        arguments.Hallucination(),
    ),
    "mann": _method(
        "a network that writes the support set to an external memory",
        MEMORY,
        arguments.Mann(),
    ),
    "feature-neighbour": _method(
        "the closest support image in pre-trained features",
        TRANSFER,
        arguments.PretrainedFeatures(compare="neighbour"),
    ),
    "feature-centroid": _method(
        "the closest class mean in pre-trained features",
        TRANSFER,
        arguments.PretrainedFeatures(),
    ),
    "feature-cosine": _method(
        "the class mean of largest cosine in pre-trained features",
        TRANSFER,
        arguments.PretrainedFeatures(compare="cosine"),
    ),
    "finetune-head": _method(
        "a new head on pre-trained features, rate and steps tuned",
        TRANSFER,
        arguments.FineTuning(),
        *_FINE,
    ),
    "finetune-all": _method(
        "the whole pre-trained network, rate and steps tuned",
        TRANSFER,
        arguments.FineTuning(tune="all"),
        0.001,
        0.003,
        0.01,
        0.03,
        0.1,
    ),
    "baseline++": _method(
        "finetune-head with cosines for scores, also in pre-training",
        TRANSFER,
        arguments.FineTuning(classifier="cosine"),
        *_FINE,
    ),
    "nearest-neighbour": _method(
        "the closest support image in pixels", BASELINE, arguments.NearestNeighbour()
    ),
}
LEARNS_INIT = tuple(name for name, method in METHODS.items() if method.learns_init)


def init_source(methods: Sequence[str]) -> str | None:
    """The method whose learned theta_0 the hand-made rules start from."""
    return next((name for name in methods if METHODS[name].learns_init), None)


@functools.cache
def kind_of(method: str, learner: str) -> type:
    """The dataclass of all options of a method, for a network by name."""
    own = type(METHODS[method].default)
    fields = [
        ("method", own, field(default=METHODS[method].default)),
        ("learner", LEARNERS[learner], field(default=LEARNERS[learner]())),
        ("training", Training, field(default=Training())),
    ]
    name = own.__name__ + LEARNERS[learner].__name__
    return dataclasses.make_dataclass(name, fields, frozen=True)


# -- specs -----------------------------------------------------------------------------


def spec_of(options: Any, data: Data, num_classes: int = 2) -> Spec:
    """What `metalstm.specs.build_algorithm` builds a method from.

    Args:
      options: of `kind_of`.
      num_classes: of the meta-train split, which transfer methods pre-train on.
    """
    own, learner = options.method, options.learner
    turns = 4 if options.training.rotations else 1  # turned characters are classes
    shots = options.training.train_shots
    given = arguments.Given(data.way, learner, turns * num_classes, shots)
    spec: Spec = {"algorithm": own.constructor}
    if isinstance(own, arguments.NearestNeighbour):
        return spec
    if not isinstance(own, arguments.GradientAgreement):
        spec |= arguments.head_of(given, features=own.features)
    if isinstance(own, arguments.Relation) and isinstance(learner, Conv4):
        # feature maps, halved twice as published
        maps = {"feature_maps": True, "num_halvings": min(2, learner.num_blocks)}
        spec["learner"] |= maps
    return spec | own.arguments(given)


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
        compare = "cosine" if kind == "cosine" else "centroid"
        shared = arguments.PretrainedFeatures(own.method.batch_size, compare, kind)
        own = kind_of("feature-centroid", own.learner.learner)(
            shared, own.learner, own.training
        )
        spec = {n: spec[n] for n in ("learner", "num_classes")}
        spec |= {"algorithm": "pretrained_features", **vars(shared)}
        mine = Pretraining(spec, own)
        number, called = 1, f"pretrained-{kind}"
        while called in wanted and wanted[called] != mine:
            number += 1
            called = f"pretrained-{kind}-{number}"
        wanted.setdefault(called, mine)
        used[name] = called
    return wanted, used
