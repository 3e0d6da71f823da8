"""The options of methods on top of a learner's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from experiments.few_shot.arguments import Arguments, Given, Spec
from experiments.few_shot.options import AtLeast1, AtLeast2, Conv4, Positive


@dataclass(frozen=True)
class Comparing(Arguments):
    features: ClassVar = True
    own_only: ClassVar = ("loss", "distance", "context_steps")
    train_way: AtLeast2 | None = None
    """Classes of a meta-training episode; default --way."""
    train_queries: AtLeast1 | None = None
    """Query images of each class in meta-training; default --queries."""

    def arguments(self, given: Given) -> Spec:
        return super().arguments(given) | {"train_way": self.train_way or given.way}


Distance = Literal["euclidean", "cosine"]


@dataclass(frozen=True)
class Prototypical(Comparing):
    """Distance to mean embeddings."""

    constructor: ClassVar = "prototypical"
    distance: Distance = "euclidean"
    """How embeddings are compared."""


@dataclass(frozen=True)
class Matching(Comparing):
    """Attention over support images."""

    constructor: ClassVar = "matching"
    distance: Distance = "cosine"
    """How embeddings are compared."""
    context_steps: AtLeast1 | None = None
    """Steps of the full context embedding; default none."""


@dataclass(frozen=True)
class Relation(Comparing):
    """A network compares feature maps."""

    constructor: ClassVar = "relation"
    loss: Literal["squared", "cross_entropy"] = "squared"
    """The error of a pair, or over classes."""

    def arguments(self, given: Given) -> Spec:
        own, shared = given.learner, ("filters", "norm", "scale_init", "initializer")
        of_net = {n: getattr(own, n, getattr(Conv4, n)) for n in shared}
        net = {"learner": "relation_net", **of_net}
        return super().arguments(given) | {"relation_net": net}


@dataclass(frozen=True)
class Siamese(Comparing):
    """Nearest embedding, learned from pairs or triplets."""

    constructor: ClassVar = "siamese"
    loss: Literal["contrastive", "triplet"] = "contrastive"
    """Of pairs, or of triplets."""


@dataclass(frozen=True)
class Hallucination(Comparing):
    """Prototypical, with support examples imagined by a generator."""

    constructor: ClassVar = "hallucination"
    num_generated: AtLeast1 = 4
    """Examples generated from each support image."""


@dataclass(frozen=True)
class Mann(Arguments):
    """A network that writes the support set to an external memory."""

    constructor: ClassVar = "mann"
    features: ClassVar = True
    own_only: ClassVar = ("hidden_size",)
    hidden_size: AtLeast1 = 200
    """Units of the controller."""
    num_slots: AtLeast2 = 128
    """Slots of the memory."""
    train_queries: AtLeast1 | None = None
    """Query images of each class in meta-training; default --queries."""

    def arguments(self, given: Given) -> Spec:
        return super().arguments(given) | {"way": given.way}


@dataclass(frozen=True)
class Transfer(Arguments):
    features: ClassVar = True
    own_only: ClassVar = (
        "num_steps", "batch_size", "loss", "scale", "compare", "classifier", "tune",
    )  # fmt: skip
    batch_size: AtLeast1 | None = None
    """Images of one step of pre-training; default as many as an episode has."""

    def arguments(self, given: Given) -> Spec:
        return super().arguments(given) | {"num_classes": given.num_classes}


@dataclass(frozen=True)
class MarginClassifier(Transfer):
    """Cosine of features pre-trained with a margin."""

    constructor: ClassVar = "margin_classifier"
    loss: Literal["am_softmax", "arcface", "sphereface"] = "am_softmax"
    """A margin of cosines, a margin of angles, or multiplied angles."""
    scale: Positive | None = None
    """Of the features; default the loss's own."""


@dataclass(frozen=True)
class PretrainedFeatures(Transfer):
    """The closest support image or class mean in pre-trained features."""

    constructor: ClassVar = "pretrained_features"
    compare: Literal["neighbour", "centroid", "cosine"] = "centroid"
    """With the support images, or with class means."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Of pre-training."""


@dataclass(frozen=True)
class FineTuning(Transfer):
    """A pre-trained network, tuned on the support set."""

    constructor: ClassVar = "fine_tuning"
    num_steps: AtLeast1 = 100
    """Updates, at most: fewer are tried on validation."""
    tune: Literal["head", "all"] = "head"
    """A new head, or the whole network."""
    classifier: Literal["linear", "cosine"] = "linear"
    """The head, also in pre-training."""


@dataclass(frozen=True)
class NearestNeighbour(Arguments):
    """The closest support image in pixels."""

    constructor: ClassVar = "nearest_neighbour"
