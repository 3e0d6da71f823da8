"""The options of methods: fields are their constructors' arguments.

What follows from other options (``num_classes`` from the data, a rule's number of steps
from the inner loop's) is no option: `arguments` adds it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from experiments.common.cli import Flat
from experiments.few_shot.options import (
    AtLeast1,
    AtLeast2,
    Conv4,
    Learner,
    NotNegative,
    Positive,
)

Spec = dict[str, Any]
QueryNorm = Literal["support", "support+1", "transductive", "frozen"]


class Given(NamedTuple):
    """What arguments follow from besides a method's own options."""

    way: int
    learner: Learner
    num_classes: int  # of the meta-train split, which transfer methods pre-train on
    train_shots: int | None = None


@dataclass(frozen=True)
class Arguments:
    """Options of a method; the fields are its constructor's arguments."""

    constructor: ClassVar[str]
    own_only: ClassVar[tuple[str, ...]] = ()  # not set by a flag for all methods
    features: ClassVar[bool] = False  # whether the learner has no head

    def arguments(self, given: Given) -> Spec:
        del given
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def head_of(given: Given, *, features: bool) -> Spec:
    """The ``learner`` argument: the network with its head, or up to its features."""
    options = dict(vars(given.learner))
    tied = options.pop("tied_head") and not features
    way = None if tied or features else given.way
    learner = {"learner": options.pop("learner"), "num_classes": way, **options}
    return {"learner": {"learner": "tied_head", "body": learner} if tied else learner}


# -- methods that adapt a learner by gradients -----------------------------------------


@dataclass(frozen=True)
class InnerLoop(Arguments):
    """The inner loop."""

    num_steps: AtLeast1 = 5
    """Inner updates."""
    num_test_steps: AtLeast1 | None = None
    """Inner updates at meta-test, when they differ."""
    query_norm: QueryNorm = "support"
    """Which statistics a batch norm uses for a query at meta-test."""
    train_query_norm: QueryNorm = "transductive"
    """The same in meta-training; published: the query batch's own."""
    support_stats: Literal["final", "moving"] = "final"
    """How `support` gathers: one more pass at theta_T, or the moving average over the
    inner passes (Meta-LSTM as published)."""
    batch_size: AtLeast1 | None = None
    """Images of the support set in one inner update; default all."""
    gradient_scale: float | Literal["1/batch", "way"] = 1.0
    """What the mean gradient is multiplied by: 1/batch divides it by the batch size
    (Meta-LSTM as published); way multiplies it by the number of classes, so that steps
    fit any --train-way."""
    train_way: AtLeast2 | None = None
    """Classes of a meta-training episode, with --tied-head; default --way."""
    train_queries: AtLeast1 | None = None
    """Query images of each class in meta-training; default --queries."""
    task_mapping: Literal["vmap", "scan", "unroll"] | None = None
    """How the tasks of a meta-step are laid out; default: the backend's best."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        if given.learner.tied_head and self.train_way is None:
            found["train_way"] = given.way
        order, keep, last = (found.pop(n, None) for n in ("order", "keep", "last"))
        if order or keep or last:
            order = order or "second"
            found["differentiation"] = {"order": order, "keep": keep, "last": last}
        return found

    def most_steps(self) -> int:
        return max(self.num_steps, self.num_test_steps or 0)


Keep = Literal["all", "remat", "mixed", "segments"] | None


@dataclass(frozen=True)
class SecondOrder(InnerLoop):
    keep: Keep = None
    """What is stored for the backward pass, the rest is recomputed: all, remat, mixed
    (the default) or segments; docs/memory.md."""
    last: AtLeast1 | None = None
    """Differentiate through the gradients of the last so many updates only."""


@dataclass(frozen=True)
class EitherOrder(SecondOrder):
    order: Literal["first", "second"] = "first"
    """Whether to differentiate through the inner gradients."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        if self.order == "first":
            del found["differentiation"]["last"]
        return found


@dataclass(frozen=True)
class Gates:
    """The Meta-LSTM's update rule."""

    hidden_size: NotNegative | None = 20
    """Units of the LSTM that reads gradients and losses; None: gates on features
    alone."""
    variant: Literal["code", "paper"] = "code"
    """Gates read their previous logit (the authors' code) or value (the paper)."""
    forget: Literal["gate", "one"] = "gate"
    """one: an ablation, the forget gate fixed at 1."""
    input: Literal["gate", "constant"] = "gate"
    """constant: an ablation, the input gate a learned constant."""
    loss_input: bool = True
    """Whether the rule sees the loss."""
    theta_input: bool = True
    """Whether the gates see the parameter."""
    carry_input: bool = True
    """Whether the gates see their previous value."""
    feature_gradient: Literal["stopped", "full"] = "stopped"
    """Second order: whether derivatives pass through the gradient's features."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Range of the forget gate's initial bias."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Range of the input gate's initial bias; it sets the first step size."""
    input_bias_of: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Another range for the tensors of a part, such as `head -0.5 -0.5`; needs
    --bias-per tensor or tensor_and_step."""
    bias_per: Literal["rule", "tensor", "tensor_and_step"] = "rule"
    """One gate bias, one for each tensor, or one for each tensor and step."""


@dataclass(frozen=True)
class FirstOrderMetaLstm(InnerLoop):
    """Gates that mix parameters and gradients, learned with theta_0."""

    constructor: ClassVar = "meta_lstm"
    order: ClassVar[str] = "first"
    support_stats: Literal["final", "moving"] = "moving"
    """How `support` gathers: one more pass at theta_T, or the moving average over the
    inner passes (as published)."""
    gradient_scale: float | Literal["1/batch", "way"] = "1/batch"
    """What the mean gradient is multiplied by: 1/batch divides it by the batch size, as
    published; way multiplies it by the number of classes, so that steps fit any
    --train-way."""
    learn_init: bool = True
    """Learn theta_0; without, it is drawn for every episode and the rule learned
    alone."""
    rule: Flat[Gates] = field(default_factory=Gates)

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        found.setdefault("differentiation", {"order": "first"})
        rule = dataclasses.asdict(self.rule)
        rule["input_bias_of"] = rule["input_bias_of"] or None
        rule["num_bias_steps"] = self.most_steps()
        return found | {"rule": {"rule": "lstm_gates", **rule}}


@dataclass(frozen=True)
class MetaLstm(FirstOrderMetaLstm, EitherOrder):
    """Gates that mix parameters and gradients, learned with theta_0."""

    order: Literal["first", "second"] = "first"  # type: ignore[misc]
    """Whether to differentiate through the inner gradients."""


@dataclass(frozen=True)
class Fomaml(InnerLoop):
    """theta_0 learned, fixed SGD, first order."""

    constructor: ClassVar = "fomaml"
    rate: Positive = 0.1
    """Step size of the inner SGD."""


@dataclass(frozen=True)
class Maml(SecondOrder):
    """theta_0 learned, fixed SGD, second order."""

    constructor: ClassVar = "maml"
    rate: Positive = 0.1
    """Step size of the inner SGD."""


@dataclass(frozen=True)
class Anil(Maml):
    """MAML that adapts the head alone."""

    constructor: ClassVar = "anil"


@dataclass(frozen=True)
class MetaSgd(Maml):
    """theta_0 and a rate for every parameter learned."""

    constructor: ClassVar = "meta_sgd"
    rate: Positive = 0.1
    """Where the learned step sizes start."""

    def arguments(self, given: Given) -> Spec:
        return super().arguments(given) | {"rate": (self.rate, self.rate)}


@dataclass(frozen=True)
class LearnedSgd(EitherOrder):
    """theta_0 and a rate for every tensor and step learned."""

    constructor: ClassVar = "learned_init"
    rate: Positive = 0.1
    """Where the learned step sizes start."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        found.setdefault("differentiation", {"order": "first"})
        rule = {"rate": found.pop("rate"), "per": "tensor"}
        rule["num_steps"] = self.most_steps()
        return found | {"rule": {"rule": "learned_sgd", **rule}}


@dataclass(frozen=True)
class Reptile(InnerLoop):
    """theta_0 moves towards where the inner loop ends."""

    constructor: ClassVar = "reptile"
    adam_rate: Positive = 1e-3
    """Step size of the inner Adam."""
    test_batch_size: AtLeast1 | None = None
    """Images of the support set in one inner update at meta-test; default all."""
    outer_step: Positive = 1.0
    """The share of the way to theta_T that theta_0 goes in a meta-step (in place of
    --learning-rate and --clip; --schedule applies)."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        del found["outer_step"]
        rule = found.pop("adam_rate")
        return found | {"rule": rule, "train_shots": given.train_shots}


@dataclass(frozen=True)
class ImplicitMaml(InnerLoop):
    """theta_0 pulls during the inner loop, implicit gradient."""

    constructor: ClassVar = "implicit_maml"
    rate: Positive = 0.1
    """Step size of the inner SGD."""
    strength: Positive = 2.0
    """Of the pull towards theta_0."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        return found | {"rule": found.pop("rate")}


@dataclass(frozen=True)
class GradientAgreement(InnerLoop):
    """Tasks weighed by how their gradients agree."""

    constructor: ClassVar = "gradient_agreement"
    of: Literal["maml", "fomaml", "reptile"] = "maml"
    """Whose gradients are weighed."""
    rate: Positive = 0.1
    """Step size of the inner SGD of maml and fomaml."""
    adam_rate: Positive = 1e-3
    """Step size of reptile's inner Adam."""
    outer_step: Positive = 1.0
    """Of reptile; see --help reptile."""

    def arguments(self, given: Given) -> Spec:
        kind = _WEIGHED[self.of]
        names = (f.name for f in dataclasses.fields(kind) if hasattr(self, f.name))
        weighed = kind(**{name: getattr(self, name) for name in names})
        of = {"algorithm": self.of, **head_of(given, features=False)}
        return {"of": of | weighed.arguments(given), "task_mapping": self.task_mapping}


_WEIGHED: dict[str, type[InnerLoop]] = {
    "maml": Maml,
    "fomaml": Fomaml,
    "reptile": Reptile,
}


@dataclass(frozen=True)
class HandMade(InnerLoop):
    """An optimizer from the first learned theta_0 of the list, its rate tuned."""

    constructor: ClassVar = "learned_init"
    optimizer: ClassVar[str]

    def arguments(self, given: Given) -> Spec:
        return super().arguments(given) | {
            "differentiation": {"order": "first"},
            "trainable": False,
            "rule": optimizer_spec(self.optimizer),
        }


def optimizer_spec(name: str) -> Spec:
    momentum = {"momentum": 0.9} if name == "momentum" else {}
    return {"rule": name, "learning_rate": 0.01, **momentum}


@functools.cache
def hand_made(name: str) -> type[HandMade]:
    return type(name, (HandMade,), {"optimizer": name, "__doc__": HandMade.__doc__})


@dataclass(frozen=True)
class Scratch(Arguments):
    """A fresh learner trained on the support set."""

    constructor: ClassVar = "from_scratch"
    own_only: ClassVar = ("num_steps",)
    num_steps: AtLeast1 = 50
    """Updates."""
    query_norm: QueryNorm = "support"
    """Which statistics a batch norm uses for a query; frozen: as support, for nothing
    is gathered here."""

    def arguments(self, given: Given) -> Spec:
        norm = "support" if self.query_norm == "frozen" else self.query_norm
        rule = optimizer_spec("sgd")
        return {"num_steps": self.num_steps, "query_norm": norm, "rule": rule}


# -- methods that compare embeddings, write to a memory, or transfer -------------------


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
