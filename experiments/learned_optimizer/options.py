"""The options of learned_optimizer, typed; no jax here, so that --help is quick.

Flags are flat (``--steps``), the groups only order them. `check` refuses what cannot
work and can be told without data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from experiments.common.devices import MAY_CHANGE, Devices
from experiments.common.devices import check as check_devices
from experiments.few_shot.options import (
    did_you_mean,
    from_json,
    groups,
    read_config,
    value_of,
    with_flags,
)

RULES = {
    "l2l": "a coordinate-wise LSTM, as --features and the like make it",
    "l2l-published": "the same as Andrychowicz et al. (2016) had it",
    "v2": "a gradient memory chained into gates",
    "meta-lstm": "the gates of Ravi & Larochelle (2017), with their LSTM",
    "gates": "the gates alone, on features, without an LSTM",
    "meta-lstm-f1": "meta-lstm with the forget gate fixed at 1",
    "gates-f1": "gates with the forget gate fixed at 1",
    "v2-f1": "v2 with the forget gate fixed at 1",
    "learned-sgd": "one learned rate",
}
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


@dataclass(frozen=True)
class Problem:
    """What is optimized."""

    problem: Literal[
        "quadratics", "logistic", "mlp", "conv", "sinusoids", "plateau"
    ] = "quadratics"
    """The family of problems."""
    dataset: str = "glyphs"
    """mlp and conv: glyphs (needs no download) or the name of a TFDS
    image-classification set, such as mnist."""
    data_dir: Path | None = None
    """Where the data set is; also the environment's TFDS_DATA_DIR."""
    train_image_size: int | None = None
    """Meta-train on images resized to this: a smaller network is a faster one."""
    dim: int = 10
    """quadratics, logistic and plateau: number of parameters."""
    distribution: Literal["normal", "uniform"] = "normal"
    """quadratics: entries of W and y are N(0, 1) or U(0, 1)."""
    widths: tuple[int, ...] = (20,)
    """mlp and sinusoids: units of each hidden layer."""
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    """mlp: of the hidden layers."""
    init_std: float | None = None
    """Standard deviation of the initial parameters; default: the family's own."""
    batch_size: int = 128
    """Examples in one minibatch."""
    scaling: tuple[float, float] | None = None
    """In meta-training, theta = c phi with log c uniform between these bounds."""
    scaling_per: Literal["coordinate", "tensor"] = "coordinate"
    """One c for each coordinate, or for each tensor."""


@dataclass(frozen=True)
class RuleOptions:
    """What is learned."""

    rules: tuple[str, ...] = ("l2l",)
    """Several are meta-trained on the same problems and budget and compared in one
    table. NAME=FILE.npz takes a trained rule as it is."""
    hidden: int = 20
    """Units of each LSTM."""
    lstm_layers: int = 2
    """l2l: layers."""
    output_scale: float = 0.1
    """l2l: factor of the update."""
    features: Literal["log_sign", "raw", "moments"] = "log_sign"
    """l2l: what the LSTM reads: the gradient, published in two ways, or what Adam
    reads of it."""
    shortcut: float | None = None
    """l2l with moments: start as Adam of the rate --output-scale times this."""
    relative: bool = False
    """l2l with moments: updates in units of the gradient's size, as momentum's are."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Gates: range of the forget gate's initial bias."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Gates: range of the input gate's initial bias; it sets the first step size."""
    gradient_factor: float = 1.0
    """meta-lstm and gates: multiply gradients by a learned factor that starts here, for
    problems whose best step is above the 1 where an input gate ends."""
    separate: Literal["none", "conv-or-dense", "matrix-or-vector"] = "none"
    """A rule of its own for each kind of tensor."""
    rule_options: str = ""
    """JSON by rule, for every argument of the constructors:
    '{"v2": {"memory": {"hidden_size": 10}}}'."""


@dataclass(frozen=True)
class Budget:
    """Meta-training."""

    meta_steps: int = 2_000
    """Updates of each rule's parameters."""
    minutes: float | None = None
    """Stop each rule's meta-training after this long (instead of --meta-steps)."""
    tasks: int = 16
    """Problems optimized at once."""
    unroll: int = 20
    """Inner updates of one meta-step; what came before is a constant to it."""
    horizon: int = 100
    """Inner updates after which a problem starts again; a multiple of --unroll."""
    first_horizon: int | None = None
    """A curriculum: the horizon doubles from here to --horizon, in equal shares of the
    first half of --meta-steps (without --stages)."""
    stages: tuple[str, ...] = ()
    """A curriculum, UNROLL:META_STEPS for each stage: whole trajectories of UNROLL
    updates. What is left of --meta-steps has --unroll and --horizon."""
    second_order: bool = False
    """Differentiate through the inner gradients."""
    memory: Literal["plain", "remat", "mixed", "segments"] = "mixed"
    """What the updates of a meta-step keep for their derivative, from most to least;
    for an --unroll of hundreds: segments. docs/memory.md has the figures."""
    loss_transform: Literal["none", "log", "relative"] = "none"
    """Of the losses of a trajectory, before they are averaged."""
    weights: Literal["uniform", "linear"] = "uniform"
    """Of these losses; linear: from 0 at the start to 2 at the horizon."""
    estimator: Literal["backprop", "pes"] = "backprop"
    """backprop: truncated; pes: persistent evolution strategies, unbiased."""
    pes_std: float = 0.01
    """Standard deviation of the perturbations of pes."""
    stagger: bool = False
    """Start the problems of a meta-step at different points of their horizons."""
    learning_rate: float = 1e-3
    """Adam's, on the rule's parameters."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: to 0 over --meta-steps."""
    clip: float = 1.0
    """Global norm to which the meta-gradient is clipped; 0: not."""
    steps_per_call: int = 1
    """Meta-steps in one compiled call."""
    validate_every: int = 200
    """Meta-steps between validations; the best parameters are kept."""
    validation_instances: int = 32
    """Problems of one validation, each optimized for --steps updates."""
    save_every: int = 200
    """Meta-steps between checkpoints."""


@dataclass(frozen=True)
class Test:
    """Comparison on problems that nothing was learned or tuned on."""

    study: tuple[str, ...] = ("comparison", "cost")
    """Which studies to make: comparison, generalisation, panels, plateau, cost; or
    none."""
    steps: int = 100
    """Updates of each problem."""
    instances: int = 100
    """Problems, the same for every optimizer."""
    eval_batch: int = 1_000
    """Examples on which a loss is measured."""
    record_every: int = 1
    """Measure the loss after every so many updates."""
    baselines: tuple[str, ...] = BASELINES
    """Hand-made optimizers, their rates tuned; adam-cosine has its rate decay to 0."""
    few_baselines: tuple[str, ...] = ("sgd", "nesterov", "rmsprop", "adam")
    """Those of generalisation, panels and plateau, where they are tuned again on every
    problem."""
    tune_instances: int = 64
    """Other problems, on which they are tuned."""
    tune_for: Literal["mean", "mean-log"] | None = None
    """What the last loss is tuned for; default: mean-log for quadratics, else mean."""
    long_steps: int = 1_000
    """generalisation: updates at the long horizon; 0 leaves it out."""
    long_instances: int = 100
    """generalisation: problems at the long horizon."""
    escape_below: float = 0.1
    """plateau: a problem has escaped when its loss is below this share of the first."""
    test_seed: int = 0
    """Which problems."""
    curves: Path | None = None
    """Where measured curves are kept, so that none is measured twice; default: the run
    folder's curves/. Several runs may share one."""


@dataclass(frozen=True)
class Run:
    """Where and how to run."""

    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    seed: int = 0
    """Of initialisation and of the problems of meta-training."""
    workdir: Path | None = None
    """The run folder; default runs/learned_optimizer/PROBLEM-SEED."""
    resume: Path | None = None
    """Go on with the run in this folder."""
    evaluate: Path | None = None
    """Make the studies of the run in this folder again, without meta-training."""
    beside: Path | None = None
    """panels: a run on quadratics whose rules make the first panel."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class Config:
    problem: Problem = field(default_factory=Problem)
    rule: RuleOptions = field(default_factory=RuleOptions)
    budget: Budget = field(default_factory=Budget)
    test: Test = field(default_factory=Test)
    devices: Devices = field(default_factory=Devices)
    run: Run = field(default_factory=Run)


def may_change(config: Config) -> tuple[str, ...]:
    """What may differ when a run goes on: neither problem, nor rule, nor recipe."""
    names = [
        *(f"run.{name}" for name in vars(config.run) if name != "seed"),
        *(f"test.{name}" for name in vars(config.test) if name != "steps"),
        *MAY_CHANGE, "problem.data_dir", "budget.memory", "budget.minutes",
        "rule.rules",
    ]  # fmt: skip
    fixed = config.budget.schedule == "cosine" or config.budget.first_horizon
    return (*names,) if fixed else (*names, "budget.meta_steps")


def trained_rules(config: Config) -> dict[str, Path]:
    """The NAME=FILE among ``--rules``."""
    pairs = (name.split("=", 1) for name in config.rule.rules if "=" in name)
    return {name: Path(path) for name, path in pairs}


def rule_names(config: Config) -> list[str]:
    return [name.split("=", 1)[0] for name in config.rule.rules]


def rule_options(config: Config) -> dict[str, dict[str, Any]]:
    """Read ``--rule-options``; raises ValueError when it is not JSON by rule."""
    if not config.rule.rule_options:
        return {}
    try:
        found = json.loads(config.rule.rule_options)
        assert all(isinstance(v, dict) for v in found.values())
    except (json.JSONDecodeError, AttributeError, AssertionError):
        raise ValueError(
            f"--rule-options {config.rule.rule_options}: give JSON by rule, such as "
            '\'{"l2l": {"p": 5}}\''
        ) from None
    for name in found:
        if name not in RULES:
            raise ValueError(f"--rule-options {name}: {did_you_mean(name, RULES)}")
    return found


class Stage(NamedTuple):
    """A part of meta-training with one program."""

    unroll: int
    horizon: int
    start: int  # meta-steps done when it begins
    end: int  # and when it ends


def stages(config: Config) -> list[Stage]:
    """Read ``--stages``; the last one is what the other flags say.

    Raises:
      ValueError: a stage is not UNROLL:META_STEPS, or they fill --meta-steps.
    """
    budget = config.budget
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
    return [*found, Stage(budget.unroll, budget.horizon, end, budget.meta_steps)]


def parse(arguments: list[str]) -> Config:
    """Read the command line; a preset or a run gives the defaults.

    Raises:
      ValueError: an unknown preset, or options that cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
    """
    from experiments.learned_optimizer.presets import preset

    default = Config()
    named = value_of("--preset", arguments)
    if named is not None:
        default = preset(named)
    for flag in ("--resume", "--evaluate"):
        folder = value_of(flag, arguments)
        if folder is None:
            continue
        if named is not None:
            raise ValueError(f"{flag} takes its options from the run; drop --preset")
        default = from_json(read_config(Path(folder))["config"], Config())
        default = with_flags(
            default, resume=None, evaluate=None, workdir=None, beside=None
        )
        # it may go on elsewhere
        default = replace(default, devices=Devices())
    config = tyro.cli(
        Config,
        args=arguments,
        default=default,
        description=_DESCRIPTION,
        prog="python -m experiments.learned_optimizer",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    for flag, values in (
        ("rules", config.rule.rules),
        ("stages", config.budget.stages),
        ("baselines", config.test.baselines),
        ("few_baselines", config.test.few_baselines),
        ("study", config.test.study),
    ):
        split = [part for item in values for part in item.split(",") if part]
        split = [part for part in split if part != "none"]
        config = with_flags(config, **{flag: tuple(split)})
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the data are.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    _check_names(config)
    _check_ranges(config)
    budget, run = config.budget, config.run
    if budget.horizon % budget.unroll:
        raise ValueError(
            f"--horizon {budget.horizon} is not a multiple of --unroll "
            f"{budget.unroll}: choose {budget.horizon // budget.unroll + 1} x "
            f"{budget.unroll}, say"
        )
    first = budget.first_horizon
    if first is not None and (first % budget.unroll or first > budget.horizon):
        raise ValueError(
            f"--first-horizon {first}: choose a multiple of --unroll {budget.unroll} "
            f"up to --horizon {budget.horizon}"
        )
    stages(config)
    staged = first is not None or budget.stages or budget.schedule == "cosine"
    if budget.minutes is not None and staged:
        raise ValueError(
            "--minutes: a curriculum and a cosine need --meta-steps to know their end"
        )
    for name in ("meta_steps", "validate_every", "save_every"):
        value = getattr(budget, name)
        if value % budget.steps_per_call:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not a multiple of "
                f"--steps-per-call {budget.steps_per_call}"
            )
    if config.test.steps % config.test.record_every:
        raise ValueError(
            f"--record-every {config.test.record_every} does not divide --steps "
            f"{config.test.steps}: choose a divisor"
        )
    if run.resume is not None and run.workdir is not None:
        raise ValueError("--resume RUN goes on in that folder; drop --workdir")
    if run.evaluate is not None and run.resume is not None:
        raise ValueError("--evaluate and --resume: choose one")
    check_devices(config.devices)
    if run.evaluate is not None and config.devices.distributed:
        raise ValueError("--evaluate runs in one process: drop --distributed")


def _check_names(config: Config) -> None:
    names, files = rule_names(config), trained_rules(config)
    if not names:
        raise ValueError(f"--rules is empty: choose from {', '.join(RULES)}")
    for name in names:
        if name not in RULES and name not in files:
            raise ValueError(f"--rules {name}: {did_you_mean(name, RULES)}")
        if names.count(name) > 1:
            raise ValueError(f"--rules names {name} twice: drop one")
        if name in BASELINES + MORE_BASELINES:
            raise ValueError(f"--rules {name}=FILE: a baseline has that name")
    for name, path in files.items():
        if not path.exists():
            raise FileNotFoundError(
                f"--rules {name}={path}: there is no such file; a run writes its rules "
                "to RUN/rules/NAME.npz"
            )
    for name in (*config.test.baselines, *config.test.few_baselines):
        if name not in BASELINES + MORE_BASELINES:
            close = did_you_mean(name, BASELINES + MORE_BASELINES)
            raise ValueError(f"--baselines {name}: {close}")
    for name in config.test.study:
        if name not in STUDIES:
            raise ValueError(f"--study {name}: {did_you_mean(name, STUDIES)}")
    kind, study = config.problem.problem, config.test.study
    if "panels" in study and kind != "mlp":
        raise ValueError(
            f"--study panels: the six panels are of an mlp, not {kind}; take a run of "
            "--preset mnist-mlp, and with --beside one on quadratics"
        )
    if "plateau" in study and kind not in _WITHOUT_BATCHES:
        raise ValueError(
            f"--study plateau draws gates without minibatches: choose --problem "
            f"{', '.join(_WITHOUT_BATCHES)}"
        )
    rule_options(config)


def _check_ranges(config: Config) -> None:
    at_least = {
        "dim": 1, "batch_size": 1, "hidden": 1, "lstm_layers": 1, "meta_steps": 1,
        "tasks": 1, "unroll": 1, "horizon": 1, "first_horizon": 1, "clip": 0,
        "steps_per_call": 1, "validate_every": 1, "validation_instances": 2,
        "save_every": 1, "steps": 1, "instances": 2, "eval_batch": 1,
        "record_every": 1, "tune_instances": 2, "long_steps": 0, "long_instances": 2,
        "seed": 0, "test_seed": 0,
    }  # fmt: skip
    above_zero = (
        "learning_rate", "minutes", "pes_std", "output_scale", "init_std",
        "escape_below",
    )  # fmt: skip
    for group in groups(config):
        for name, value in vars(getattr(config, group)).items():
            flag = f"--{name.replace('_', '-')}"
            low = at_least.get(name)
            parts = value if isinstance(value, tuple) else (value,)
            if any(part != part for part in parts):  # NaN, below and above nothing
                raise ValueError(f"{flag} {value}: give a number")
            if low is not None and value is not None and value < low:
                raise ValueError(f"{flag} {value}: choose {low} or more")
            if name in above_zero and value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: choose a number above 0")
    low_high = config.problem.scaling
    if low_high is not None and not 0 < low_high[0] <= low_high[1]:
        raise ValueError(
            f"--scaling {low_high[0]} {low_high[1]}: choose 0 < low <= high"
        )


_DESCRIPTION = (
    "Learn an optimizer, compare it with tuned hand-made ones.\n\nRules: "
    + "; ".join(f"{name} ({what})" for name, what in RULES.items())
    + "\n\nStudies: "
    + "; ".join(f"{name} ({what})" for name, what in STUDIES.items())
)
