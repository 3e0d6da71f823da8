"""The options of learned_optimizer, typed; no jax here, so that --help is quick.

Options of a rule, of a family of problems and of meta-training are the arguments of
their constructors. `check` refuses what cannot work and can be told without data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import tyro

from experiments.common import cli
from experiments.common.cli import (
    ByName,
    Count,
    Flat,
    Names,
    Natural,
    Options,
    Pair,
    Positive,
    did_you_mean,
    replace,
    value_of,
    values_of,
)
from experiments.common.devices import MAY_CHANGE, Devices
from experiments.common.devices import check as check_devices

BASELINES = (
    "sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "adagrad", "adadelta",
)  # fmt: skip
MORE_BASELINES = ("adam-cosine",)
_WITHOUT_BATCHES = ("plateau", "quadratics", "logistic")
STUDIES = {
    "comparison": "the rules and the tuned baselines on the problem of the flags",
    "generalisation": "the same on variants of it: width, depth, activation, horizon",
    "panels": "the figure of six problems of Andrychowicz et al.",
    "plateau": "whether rules escape where the gradient vanishes, and their gates",
    "cost": "time and memory of one update, against Adam's",
}


# -- rules: their JSON is the spec that `metalstm.rules.build_rule` reads --------------


class L2L(Options, frozen=True, tag_field="rule", tag="l2l"):
    """A coordinate-wise LSTM that reads gradients."""

    hidden_size: int = 20
    """Units of each layer."""
    num_layers: int = 2
    """LSTM layers."""
    output_scale: Positive = 0.1
    """Factor of the update."""
    features: Literal["log_sign", "raw", "moments"] = "log_sign"
    """What the LSTM reads: the gradient, published in two ways, or what Adam reads."""
    p: float = 10.0
    """Of the log_sign features."""
    shortcut: float | None = None
    """With moments: start as Adam of the rate output_scale times this."""
    relative: bool = False
    """With moments: updates in units of the gradient's size, as momentum's are."""


class Gates(Options, frozen=True):
    """Gates that mix the old parameter with the gradient."""

    hidden_size: int = 20
    """Units of the LSTM below the gates; 0: they read the features."""
    variant: Literal["code", "paper"] = "code"
    """What the gates read of their previous step: the logit or the value."""
    forget: Literal["gate", "one"] = "gate"
    """one: f is fixed at 1."""
    input: Literal["gate", "constant"] = "gate"
    """constant: i is a learned constant."""
    loss_input: bool = True
    """Whether the LSTM sees the loss."""
    theta_input: bool = True
    """Whether the gates see theta."""
    carry_input: bool = True
    """Whether the gates see their own previous value."""
    feature_gradient: Literal["stopped", "full"] = "stopped"
    """Second order: whether the derivative flows through the features too."""
    p: float = 10.0
    """Of the log_sign features."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Range of the forget gate's initial bias."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Range of the input gate's initial bias; it sets the first step size."""
    init_scale: float = 0.01
    """Weights are drawn from U(-scale, scale)."""


class LstmGates(Gates, frozen=True, tag_field="rule", tag="lstm_gates"):
    """The Meta-LSTM's rule."""


class Memory(Options, frozen=True):
    """A memory of gradients, as momentum and RMSprop have."""

    hidden_size: int = 20
    """Units of its LSTM."""
    p: float = 10.0
    """Of the log_sign features."""
    eps: float = 1e-8
    """Added to the average square."""
    init_scale: float = 0.01
    """Kernels are drawn from U(-scale, scale)."""


class TwoLayer(Options, frozen=True, tag_field="rule", tag="two_layer"):
    """A gradient memory chained into gates."""

    memory: Memory = Memory()
    gates: Gates = Gates(hidden_size=0, feature_gradient="full")


class LearnedSgd(Options, frozen=True, tag_field="rule", tag="learned_sgd"):
    """SGD with a learned rate."""

    rate: float = 0.01
    """Where it starts."""
    num_steps: int | None = None
    """A rate of its own for each of this many updates."""


Rule = L2L | LstmGates | TwoLayer | LearnedSgd
RULES = {
    "l2l": "a coordinate-wise LSTM",
    "l2l-published": "the same as Andrychowicz et al. (2016) had it, in every preset",
    "v2": "a gradient memory chained into gates",
    "meta-lstm": "the gates of Ravi & Larochelle (2017), with their LSTM",
    "gates": "the gates alone, on features, without an LSTM",
    "meta-lstm-f1": "meta-lstm with the forget gate fixed at 1",
    "gates-f1": "gates with the forget gate fixed at 1",
    "v2-f1": "v2 with the forget gate fixed at 1",
    "learned-sgd": "one learned rate",
}


def named_rules(
    hidden_size: int = 20, l2l: L2L | None = None, **others: Rule
) -> dict[str, Rule]:
    """Every one of `RULES`, with LSTMs of ``hidden_size`` units."""
    found: dict[str, Rule] = {
        "l2l": l2l or L2L(hidden_size=hidden_size),
        "l2l-published": L2L(),
        "v2": TwoLayer(memory=Memory(hidden_size=hidden_size)),
        "meta-lstm": LstmGates(hidden_size=hidden_size),
        "gates": LstmGates(hidden_size=0),
    }
    for name in ("meta-lstm", "gates"):
        found[f"{name}-f1"] = replace(found[name], forget="one")
    gates = Gates(hidden_size=0, feature_gradient="full", forget="one")
    found["v2-f1"] = replace(found["v2"], gates=gates)
    return found | {"learned-sgd": LearnedSgd()} | others


# -- problems: a tag is a constructor of `metalstm.learned_optimizers.problems` --------


class Quadratics(Options, frozen=True, tag_field="family", tag="quadratics"):
    """||W theta - y||^2."""

    dim: Count = 10
    """Parameters."""
    distribution: Literal["normal", "uniform"] = "normal"
    """Entries of W and y are N(0, 1) or U(0, 1)."""
    init_std: Positive = 1.0
    """Standard deviation of the initial parameters."""


class Logistic(Options, frozen=True, tag_field="family", tag="logistic_regression"):
    """Logistic regression of Gaussian points."""

    dim: Count = 10
    """Parameters."""
    num_examples: Count = 100
    noise: float = 1.0
    """Of the labels' direction."""
    weight_decay: float = 1e-3
    init_std: Positive = 1.0
    """Standard deviation of the initial parameters."""


class Plateau(Options, frozen=True, tag_field="family", tag="plateau"):
    """A saturated neuron that is wrong about all."""

    dim: Count = 10
    """Parameters."""
    num_examples: Count = 32
    steepness: tuple[float, float] = (5.0, 20.0)
    """Range of how wide and flat the plateau is."""


class Sinusoids(Options, frozen=True, tag_field="family", tag="sinusoids"):
    """Regression of sinusoids by a tanh MLP."""

    hidden: tuple[Count, ...] = (20,)
    """Units of each hidden layer."""
    batch_size: Count = 32
    """Examples in one minibatch."""
    init_std: Positive | None = None
    """Standard deviation of the initial parameters; default: flax's own."""


class Mlp(Options, frozen=True, tag_field="family", tag="mlp_classifier"):
    """Images by a multi-layer perceptron."""

    hidden: tuple[int, ...] = (20,)
    """Units of each hidden layer; none: a linear classifier."""
    activation: Literal["sigmoid", "relu", "tanh", "elu"] = "sigmoid"
    """Of the hidden layers."""
    init_std: Positive | None = 0.01
    """Standard deviation of the initial parameters."""
    batch_size: Count = 128
    """Examples in one minibatch."""


class Conv(Options, frozen=True, tag_field="family", tag="conv_classifier"):
    """Images by a small convolutional network."""

    filters: Count = 8
    num_blocks: Count = 2
    norm: Literal["batch", "none"] = "batch"
    batch_size: Count = 64
    """Examples in one minibatch."""


Family = Quadratics | Logistic | Plateau | Sinusoids | Mlp | Conv
FAMILIES: dict[str, Family] = {
    "quadratics": Quadratics(),
    "logistic": Logistic(),
    "mlp": Mlp(),
    "conv": Conv(),
    "sinusoids": Sinusoids(),
    "plateau": Plateau(),
}


class Problem(Options, frozen=True):
    """What is optimized."""

    name: Annotated[
        Literal["quadratics", "logistic", "mlp", "conv", "sinusoids", "plateau"],
        tyro.conf.arg(name="problem"),
    ] = "quadratics"
    """The family of problems; the flags after it are its own."""
    family: Flat[Family] = Quadratics()
    dataset: str = "glyphs"
    """mlp and conv: glyphs (needs no download) or the name of a TFDS
    image-classification set, such as mnist."""
    data_dir: Path | None = None
    """Where the data set is; also the environment's TFDS_DATA_DIR."""
    train_image_size: Count | None = None
    """Meta-train on images resized to this: a smaller network is a faster one."""
    scaling: tuple[Positive, Positive] | None = None
    """In meta-training, theta = c phi with log c uniform between these bounds."""
    scaling_per: Literal["coordinate", "tensor"] = "coordinate"
    """One c for each coordinate, or for each tensor."""


# -- meta-training and test ------------------------------------------------------------


class Composition(Options, frozen=True):
    """What goes around the rules."""

    gradient_factor: Positive = 1.0
    """meta-lstm and gates: multiply gradients by a learned factor that starts here, for
    problems whose best step is above the 1 where an input gate ends."""
    separate: Literal["none", "conv-or-dense", "matrix-or-vector"] = "none"
    """A rule of its own for each kind of tensor."""


class Training(Options, frozen=True):
    """How meta-training differentiates: arguments of `learned_optimizer`."""

    num_tasks: Count = 16
    """Problems optimized at the same time."""
    unroll_steps: Count = 20
    """Inner updates of one meta-step; what came before is a constant to it."""
    horizon: Count = 100
    """Inner updates after which a problem starts again; a multiple of unroll_steps."""
    loss_transform: Literal["none", "log", "relative"] = "none"
    """Of the losses of a trajectory, before they are averaged."""
    estimator: Literal["backprop", "pes"] = "backprop"
    """backprop: truncated; pes: persistent evolution strategies, unbiased."""
    pes_std: Positive = 0.01
    """Standard deviation of the perturbations of pes."""
    stagger: bool = False
    """Start the problems of a meta-step at different points of their horizons."""


class Budget(Options, frozen=True):
    """Meta-training: how long, by which optimizer."""

    meta_steps: Count = 2_000
    """Updates of each rule's parameters."""
    minutes: Positive | None = None
    """Stop each rule's meta-training after this long (instead of --meta-steps)."""
    second_order: bool = False
    """Differentiate through the inner gradients."""
    keep: Literal["all", "remat", "mixed", "segments"] = "mixed"
    """What the updates of a meta-step keep for the backward pass, from most to least;
    for --unroll-steps of hundreds: segments. docs/memory.md has the figures."""
    weights: Literal["uniform", "linear"] = "uniform"
    """Of a trajectory's losses; linear: from 0 at the start to 2 at the horizon."""
    first_horizon: Count | None = None
    """A curriculum: the horizon doubles from here to --horizon, in equal shares of the
    first half of --meta-steps (without --stages)."""
    stages: Names = ()
    """A curriculum, UNROLL:META_STEPS for each stage: whole trajectories of UNROLL
    updates. The rest of --meta-steps has --unroll-steps and --horizon."""
    learning_rate: Positive = 1e-3
    """Adam's, on the rule's parameters."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: to 0 over --meta-steps."""
    clip: Annotated[float, cli.AT_LEAST_0] = 1.0
    """Global norm to which the meta-gradient is clipped; 0: not."""
    steps_per_call: Count = 1
    """Meta-steps in one compiled call."""
    validate_every: Count = 200
    """Meta-steps between validations; the best parameters are kept."""
    validation_instances: Pair = 32
    """Problems of one validation, each optimized for --steps updates."""
    save_every: Count = 200
    """Meta-steps between checkpoints."""


class Test(Options, frozen=True):
    """Comparison on problems that nothing was learned or tuned on."""

    study: Names = ("comparison", "cost")
    """Which studies to make: comparison, generalisation, panels, plateau, cost; or
    none."""
    steps: Count = 100
    """Updates of each problem."""
    instances: Pair = 100
    """Problems, the same for every optimizer."""
    eval_batch: Count = 1_000
    """Examples on which a loss is measured."""
    record_every: Count = 1
    """Measure the loss after every so many updates."""
    baselines: Names = BASELINES
    """Hand-made optimizers, their rates tuned; adam-cosine has its rate decay to 0."""
    few_baselines: Names = ("sgd", "nesterov", "rmsprop", "adam")
    """Those of generalisation, panels and plateau, where they are tuned again on every
    problem."""
    tune_instances: Pair = 64
    """Other problems, on which they are tuned."""
    tune_for: Literal["mean", "mean-log"] | None = None
    """What the last loss is tuned for; default: mean-log for quadratics, else mean."""
    long_steps: Natural = 1_000
    """generalisation: updates at the long horizon; 0 omits it."""
    long_instances: Pair = 100
    """generalisation: problems at the long horizon."""
    escape_below: Positive = 0.1
    """plateau: a problem has escaped when its loss is below this share of the first."""
    test_seed: Natural = 0
    """Which problems."""
    curves: Path | None = None
    """Where measured curves are kept, so that none is measured twice; default: the run
    folder's curves/. Several runs may share one."""


class Run(Options, frozen=True):
    """Where and how to run."""

    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    seed: Natural = 0
    """Of initialisation and of the problems of meta-training."""
    workdir: Path | None = None
    """The run folder; default runs/learned_optimizer/PROBLEM-SEED."""
    resume: Path | None = None
    """Resume the run in this folder."""
    evaluate: Path | None = None
    """Make the studies of the run in this folder again, without meta-training."""
    quadratics_run: Path | None = None
    """panels: a run on quadratics whose rules make the first panel."""
    debug: bool = False
    """Show tracebacks."""


class Config(Options, frozen=True):
    rules: Names = ("l2l",)
    """Rules to meta-train on the same problems and budget and to compare in one table;
    each has flags of its own, --NAME.OPTION. NAME=FILE.npz takes a trained rule."""
    problem: Flat[Problem] = Problem()
    rule: ByName[Rule] = msgspec.field(default_factory=named_rules)
    around: Flat[Composition] = Composition()
    training: Flat[Training] = Training()
    budget: Flat[Budget] = Budget()
    test: Flat[Test] = Test()
    devices: Flat[Devices] = Devices()
    run: Flat[Run] = Run()


def may_change(config: Config) -> tuple[str, ...]:
    """What may differ when a run resumes: neither problem, nor rule, nor recipe."""
    names = [
        *(f"run.{name}" for name in Run.__struct_fields__ if name != "seed"),
        *(f"test.{name}" for name in Test.__struct_fields__ if name != "steps"),
        *MAY_CHANGE, "problem.data_dir", "budget.keep", "budget.minutes", "rules",
    ]  # fmt: skip
    fixed = config.budget.schedule == "cosine" or config.budget.first_horizon
    return (*names,) if fixed else (*names, "budget.meta_steps")


def trained_rules(config: Config) -> dict[str, Path]:
    """The NAME=FILE among ``--rules``."""
    pairs = (name.split("=", 1) for name in config.rules if "=" in name)
    return {name: Path(path) for name, path in pairs}


def rule_names(config: Config) -> list[str]:
    return [name.split("=", 1)[0] for name in config.rules]


def rule_spec(name: str, config: Config) -> dict[str, Any]:
    """What `metalstm.rules.build_rule` makes a rule of."""
    rule, around = config.rule[name], config.around
    spec = cli.to_json(rule)
    if isinstance(rule, LstmGates) and around.gradient_factor != 1:
        # a learned rate with its sign reversed leaves a gradient a gradient
        factor = {"rule": "learned_sgd", "rate": -around.gradient_factor}
        spec = {"rule": "chain", "parts": [factor, spec]}
    if around.separate == "none":
        return spec
    labels = around.separate.replace("-", "_")
    groups = dict.fromkeys(labels.split("_or_"), spec)
    return {"rule": "by_group", "labels": labels, "groups": groups}


class Stage(NamedTuple):
    """A part of meta-training with one program."""

    unroll_steps: int
    horizon: int
    start: int  # meta-steps done when it begins
    end: int  # and when it ends


def stages(config: Config) -> list[Stage]:
    """Read ``--stages``; the last one is what the other flags say.

    Raises:
      ValueError: a stage is not UNROLL:META_STEPS, or they fill --meta-steps.
    """
    budget, training = config.budget, config.training
    found: list[Stage] = []
    end = 0
    for text in budget.stages:
        unroll, _, steps = text.partition(":")
        if not (unroll.isdecimal() and steps.isdecimal() and int(unroll) > 0):
            raise ValueError(f"--stages {text}: give UNROLL:META_STEPS, such as 20:500")
        if int(steps) % budget.steps_per_call:
            raise ValueError(
                f"--stages {text}: the meta-steps are not a multiple of "
                f"--steps-per-call {budget.steps_per_call}"
            )
        start, end = end, end + int(steps)
        found.append(Stage(int(unroll), int(unroll), start, end))
    if found and end >= budget.meta_steps:
        raise ValueError(
            f"--stages take {end} meta-steps and leave none of --meta-steps "
            f"{budget.meta_steps}: choose more than {end}"
        )
    last = training.unroll_steps, training.horizon, end, budget.meta_steps
    return [*found, Stage(*last)]
