"""The options of learned_optimizer, typed; no jax here, so that --help is quick.

Options of a rule, of a family of problems and of meta-training are the arguments of
their constructors.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import msgspec
import tyro

from experiments.common.cli import (
    AT_LEAST_0,
    ByName,
    Count,
    Flat,
    Names,
    Natural,
    Options,
    Pair,
    Positive,
    Share,
)
from experiments.common.constructors import options_of
from experiments.common.devices import Devices
from experiments.common.saved_options import to_json

BASELINES = (
    "sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "adagrad", "adadelta",
    "adam-cosine",
)  # fmt: skip

# -- rules: their JSON is the spec that `metalstm.rules.build_rule` reads --------------

_GATES: dict[str, Any] = {
    "omit": ["input_bias_of", "bias_per", "num_bias_steps"],  # no file can hold them
    "defaults": {"hidden_size": 20},
}
Gates = options_of("rules/gates.py", "lstm_gates", **_GATES)
Memory = options_of("rules/memory.py", "gradient_memory")


def _rule(path: str, name: str, **options: Any) -> Any:
    return options_of(f"rules/{path}.py", name, tag_field="rule", tag=name, **options)


L2L = _rule("l2l_lstm", "l2l")
LstmGates = _rule("gates", "lstm_gates", **_GATES)
LearnedSgd = _rule("classic", "learned_sgd", omit=["per"])
MomentGates = _rule("tensor_rules", "moment_gates")
MomentLstm = _rule("tensor_rules", "moment_lstm")
TwoLayer = _rule(
    "memory",
    "two_layer",
    types={"memory": Memory, "gates": Gates},
    defaults={
        "memory": Memory(),
        "gates": Gates(hidden_size=0, feature_gradient="full"),
    },
)
if TYPE_CHECKING:
    Rule = Any
else:
    Rule = L2L | LstmGates | TwoLayer | LearnedSgd | MomentGates | MomentLstm

_GATES_F1 = Gates(hidden_size=0, feature_gradient="full", forget="one")
RULES: dict[str, tuple[str, Rule]] = {
    "l2l": ("a coordinate-wise LSTM", L2L()),
    "l2l-published": ("the same as Andrychowicz et al. (2016) had it", L2L()),
    "v2": ("a gradient memory chained into gates", TwoLayer()),
    "meta-lstm": ("the gates of Ravi & Larochelle (2017), with an LSTM", LstmGates()),
    "gates": ("the gates alone, without an LSTM", LstmGates(hidden_size=0)),
    "meta-lstm-f1": ("meta-lstm, the forget gate fixed at 1", LstmGates(forget="one")),
    "gates-f1": ("gates, likewise", LstmGates(hidden_size=0, forget="one")),
    "v2-f1": ("v2, likewise", TwoLayer(gates=_GATES_F1)),
    "learned-sgd": ("one learned rate", LearnedSgd()),
    "moment-gates": ("v2 with normalised moments, --tell-progress 1", MomentGates()),
    "moment-lstm": ("l2l with the same, --tell-progress 1", MomentLstm()),
}


def named_rules() -> dict[str, Rule]:
    return {name: options for name, (_, options) in RULES.items()}


# -- problems --------------------------------------------------------------------------

# a tag is a constructor of `metalstm.learned_optimizers.problems`
FAMILIES = {
    name: options_of(
        "learned_optimizers/problems.py",
        constructor,
        omit=["num_classes"],
        tag_field="family",
        tag=constructor,
    )()
    for name, constructor in {
        "quadratics": "quadratics",
        "logistic": "logistic_regression",
        "mlp": "mlp_classifier",
        "conv": "conv_classifier",
        "sinusoids": "sinusoids",
        "plateau": "plateau",
    }.items()
}
if TYPE_CHECKING:
    Family = Any
else:
    Family = Union[tuple(map(type, FAMILIES.values()))]  # noqa: UP007 (built here)


class Problem(Options, frozen=True):
    """What is optimized."""

    name: Annotated[
        Literal["quadratics", "logistic", "mlp", "conv", "sinusoids", "plateau"],
        tyro.conf.arg(name="problem"),
    ] = "quadratics"
    """The family of problems; the flags after it are its own."""
    family: Flat[Family] = FAMILIES["quadratics"]
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


_ARGUMENTS = options_of(
    "learned_optimizers/training.py",
    "learned_optimizer",
    omit=[
        "family", "rule", "differentiation", "weights", "scan_unroll", "task_mapping",
        "axis_name",
    ],
    types={"horizon": Count, "pes_std": Positive},
    defaults={"num_tasks": 16},
    integer=Count,
)  # fmt: skip
if TYPE_CHECKING:
    Training = Any
else:
    Training = _ARGUMENTS


class Budget(Options, frozen=True):
    """Meta-training: how long, by which optimizer."""

    meta_steps: Count = 2_000
    """Updates of each rule's parameters."""
    minutes: Positive | None = None
    """Stop each rule's meta-training after this long (instead of --meta-steps)."""
    order: Literal["first", "second"] = "first"
    """Whether to differentiate through the inner gradients."""
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
    clip: Annotated[float, AT_LEAST_0] = 1.0
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
    baselines: Names = BASELINES[:-1]
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
    escape_below: Share = 0.1
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


_RULES_HELP = (
    "Rules to meta-train on the same problems and budget and to compare in one table; "
    "each has flags of its own, --NAME.OPTION. NAME=FILE.npz takes a trained rule, "
    "NAME=gates-v1 one of the package, MODULE:NAME one of your own, by a function that "
    "returns it."
)


class Config(Options, frozen=True):
    rules: Annotated[Names, tyro.conf.arg(help=_RULES_HELP)] = ("l2l",)
    problem: Flat[Problem] = Problem()
    rule: ByName[Rule] = msgspec.field(default_factory=named_rules)
    around: Flat[Composition] = Composition()
    training: Flat[Training] = _ARGUMENTS()
    budget: Flat[Budget] = Budget()
    test: Flat[Test] = Test()
    devices: Flat[Devices] = Devices()
    run: Flat[Run] = Run()


def rule_spec(name: str, config: Config) -> dict[str, Any]:
    """What `metalstm.rules.build_rule` makes a rule of."""
    rule, around = config.rule.get(name), config.around
    spec = {"rule": name} if ":" in name else to_json(rule)
    if isinstance(rule, LstmGates) and around.gradient_factor != 1:
        # a learned rate with its sign reversed leaves a gradient a gradient
        factor = {"rule": "learned_sgd", "rate": -around.gradient_factor}
        spec = {"rule": "chain", "parts": [factor, spec]}
    if around.separate == "none":
        return spec
    labels = around.separate.replace("-", "_")
    groups = dict.fromkeys(labels.split("_or_"), spec)
    return {"rule": "by_group", "labels": labels, "groups": groups}


def read_presets() -> dict[str, list[str]]:
    """The flags of each recipe in presets.toml."""
    document = tomllib.loads(Path(__file__).with_name("presets.toml").read_text())
    parts: dict[str, str] = {}
    for name, flags in document["parts"].items():
        parts[name] = flags.format_map(parts)  # of those above it
    presets = document["presets"].items()
    return {name: flags.format_map(parts).split() for name, flags in presets}
