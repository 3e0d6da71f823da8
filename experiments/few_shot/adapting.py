"""The options of methods that adapt a learner by gradients."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from experiments.common.cli import Flat
from experiments.few_shot.arguments import Arguments, Given, QueryNorm, Spec, head_of
from experiments.few_shot.options import AtLeast1, AtLeast2, NotNegative, Positive


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
    input_bias_of: tuple[tuple[str, float, float], ...] = ()
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
        of_parts = {part: (low, high) for part, low, high in rule["input_bias_of"]}
        rule["input_bias_of"] = of_parts or None
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
    own_only: ClassVar = ("optimizer",)
    optimizer: Literal["sgd", "momentum", "adagrad", "adadelta", "adam"] = "sgd"
    """Of optax."""

    def arguments(self, given: Given) -> Spec:
        found = super().arguments(given)
        rule = {"rule": found.pop("optimizer"), "learning_rate": 0.01}
        if self.optimizer == "momentum":
            rule["momentum"] = 0.9
        order = {"order": "first"}
        return found | {"differentiation": order, "trainable": False, "rule": rule}


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
        rule = {"rule": "sgd", "learning_rate": 0.01}
        return {"num_steps": self.num_steps, "query_norm": norm, "rule": rule}
