"""The options of few_shot, typed; no jax here, so that --help is quick.

Flags are flat (``--way``), the groups only order them. `check` refuses what cannot work
and can be told without data.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

METHODS = {
    "meta-lstm": "gates that mix parameters and gradients, learned with theta_0",
    "maml": "theta_0 learned, fixed SGD, second order",
    "fomaml": "the same, first order",
    "anil": "MAML that adapts the head alone",
    "reptile": "theta_0 moves towards where the inner loop ends",
    "imaml": "theta_0 pulls during the inner loop, implicit gradient",
    "gradient-agreement": "--agreement-of, tasks weighed by how their gradients agree",
    "meta-sgd": "theta_0 and a rate for every parameter learned",
    "learned-sgd": "theta_0 and a rate for every tensor and step learned",
    "prototypical": "distance to mean embeddings",
    "prototypical-cosine": "cosine with mean embeddings, scale learned",
    "matching": "attention over support images by cosine, scale learned",
    "matching-euclidean": "the same by squared distance",
    "matching-fce": "the same by cosine of full context embeddings",
    "relation": "a network compares feature maps, squared error",
    "relation-softmax": "the same, cross-entropy over classes",
    "siamese": "nearest embedding, learned from pairs",
    "siamese-triplet": "nearest embedding, learned from triplets",
    "am-softmax": "cosine of features pre-trained with a margin of cosines",
    "arcface": "the same with a margin of angles",
    "sphereface": "the same with multiplied angles",
    "sgd": "SGD from the first learned theta_0 of the list, rate tuned on validation",
    "momentum": "likewise",
    "adagrad": "likewise",
    "adadelta": "likewise",
    "adam": "likewise",
    "scratch": "a fresh learner trained on the support set, rate tuned on validation",
    "hallucination": "prototypical, with support examples imagined by a generator",
    "mann": "a network that writes the support set to an external memory",
    "feature-neighbour": "the closest support image in pre-trained features",
    "feature-centroid": "the closest class mean in pre-trained features",
    "feature-cosine": "the class mean of largest cosine in pre-trained features",
    "finetune-head": "a new head on pre-trained features, rate and steps tuned",
    "finetune-all": "the whole pre-trained network, rate and steps tuned",
    "baseline++": "finetune-head with cosines for scores, also in pre-training",
    "nearest-neighbour": "the closest support image in pixels",
}
LEARNS_INIT = (
    "meta-lstm", "maml", "fomaml", "anil", "reptile", "imaml", "gradient-agreement",
    "meta-sgd", "learned-sgd",
)  # fmt: skip
HAND_MADE = ("sgd", "momentum", "adagrad", "adadelta", "adam")

QueryNorm = Literal["support", "support+1", "transductive", "frozen"]


@dataclass(frozen=True)
class Data:
    """What to learn on."""

    dataset: str = "glyphs"
    """glyphs (needs no download), omniglot, mini-imagenet, folders (your images, one
    folder a class), or tfds:NAME for any TFDS image-classification set."""
    data_dir: Path | None = None
    """Where the data set is. For TFDS sets also the environment's TFDS_DATA_DIR."""
    split: Literal["alphabets", "characters"] = "alphabets"
    """Omniglot: test on other alphabets, or on other characters of the same ones."""
    image_size: int | None = None
    """Resize to this many pixels square; default: the data set's own choice."""
    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support images of each class."""
    queries: int = 15
    """Query images of each class."""
    train_queries: int | None = None
    """The same in meta-training, when it differs."""
    rotations: bool = False
    """Meta-train with turned characters as classes of their own (Omniglot's custom)."""
    augment: Literal["none", "shift", "crop-flip", "crop-flip-jitter"] = "none"
    """What happens to images in meta-training: shifts by up to 2 pixels, or resized
    crops and flips, or these and colour jitter."""
    normalise: Literal["none", "imagenet"] = "none"
    """Subtract ImageNet's mean and divide by its standard deviation."""


@dataclass(frozen=True)
class LearnerOptions:
    """What is adapted."""

    learner: Literal["conv4", "mlp", "resnet12"] = "conv4"
    """The network that is adapted to each episode."""
    filters: int = 32
    """conv4: filters of each layer; resnet12: of its first block."""
    blocks: int = 4
    """conv4: number of blocks."""
    strided: bool = False
    """conv4: convolutions of stride 2 instead of max-pooling."""
    widths: tuple[int, ...] = (64, 64)
    """mlp: units of each hidden layer."""
    norm: Literal["batch", "group", "layer", "none"] = "batch"
    """Normalisation layers; group and layer look at one image only."""
    norm_momentum: float = 0.05
    """Weight of the old value in the batch norm's moving average (1-shot as published:
    0.1, 5-shot: 0.05)."""
    scale_init: Literal["ones", "uniform"] = "ones"
    """Initial scale of the norm layers."""
    initializer: Literal["torch", "flax"] = "torch"
    """Initial weights: torch's U(+-1/sqrt(fan_in)), as published, or lecun_normal."""
    final_relu: bool = True
    """conv4: the last block ends in a ReLU; without, features keep their sign."""
    zero_head: bool = False
    """Start the last layer at zero."""
    tied_head: bool = False
    """All classes start from one learned vector: any --way in training and test."""


@dataclass(frozen=True)
class Methods:
    """Which algorithms, and their inner loop."""

    algorithms: tuple[str, ...] = ("meta-lstm", "maml", "scratch", "nearest-neighbour")
    """Several are compared in one table, on the same episodes."""
    steps: int = 5
    """Inner updates."""
    test_steps: int | None = None
    """Inner updates at meta-test, when they differ."""
    order: Literal["first", "second"] = "first"
    """Differentiate through the inner gradients or not. For meta-lstm and learned-sgd;
    maml and meta-sgd are second order, fomaml is first."""
    query_norm: QueryNorm | Literal["all"] = "support"
    """Which statistics a batch norm uses for a query at meta-test. all: with
    --evaluate, every mode that makes sense."""
    train_query_norm: QueryNorm = "transductive"
    """The same in meta-training; published: the query batch's own."""
    support_stats: Literal["final", "moving"] | None = None
    """How `support` gathers: one more pass at theta_T, or the moving average over the
    inner passes. Default: moving for meta-lstm as published, final for the others."""
    support_batch: int | None = None
    """Images of the support set in one inner update; default all."""
    gradient_scale: Literal["one", "batch", "way"] = "batch"
    """meta-lstm: batch divides the mean gradient by the batch size, as published; way
    multiplies it by the number of classes, so that steps fit any --train-way. The
    other methods know one and way."""
    inner_rate: float = 0.1
    """Step size of maml, fomaml, anil and imaml; where meta-sgd and learned-sgd
    start."""
    adam_rate: float = 1e-3
    """Step size of reptile's inner Adam."""
    outer_step: float = 1.0
    """reptile: the share of the way to theta_T that theta_0 goes in a meta-step (in
    place of --learning-rate and --clip; --schedule applies)."""
    train_shots: int | None = None
    """reptile: support images of each class in meta-training; default --shot."""
    train_batch: int | None = None
    """reptile: images of one inner update in meta-training; default all."""
    proximal: float = 2.0
    """imaml: strength of the pull towards theta_0."""
    agreement_of: Literal["maml", "fomaml", "reptile"] = "maml"
    """gradient-agreement: whose gradients are weighed."""
    draw_init: bool = False
    """meta-lstm: draw theta_0 afresh for every episode and learn the rule alone."""
    scratch_steps: int = 50
    """Updates of scratch."""
    finetune_steps: int = 100
    """Updates of finetune-head, finetune-all and baseline++, at most."""
    train_way: int | None = None
    """Classes of a meta-training episode, for methods that compare embeddings or with
    --tied-head; default --way."""
    imagined: int = 4
    """hallucination: examples generated from each support image."""
    memory_slots: int = 128
    """mann: slots of the memory."""
    memory_hidden: int = 200
    """mann: units of the controller."""
    task_mapping: Literal["vmap", "scan", "unroll"] | None = None
    """How the tasks of a meta-step are laid out; default: the backend's best."""


@dataclass(frozen=True)
class RuleOptions:
    """The Meta-LSTM's update rule."""

    hidden: int = 20
    """Units of the LSTM that reads gradients and losses; 0: gates on features alone."""
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
    features: Literal["stopped", "full"] = "stopped"
    """Second order: whether derivatives pass through the gradient's features."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Range of the forget gate's initial bias."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Range of the input gate's initial bias; it sets the first step size."""
    head_input_bias: tuple[float, float] | None = None
    """Another range for the tensors of the head; needs --bias-per tensor or
    tensor_and_step."""
    bias_per: Literal["rule", "tensor", "tensor_and_step"] = "rule"
    """One gate bias, one for each tensor, or one for each tensor and step."""


@dataclass(frozen=True)
class Budget:
    """Meta-training."""

    episodes: int = 10_000
    """Meta-training episodes of each method."""
    minutes: float | None = None
    """Stop each method's meta-training after this long (instead of --episodes)."""
    meta_batch: int = 4
    """Episodes of one meta-step."""
    learning_rate: float = 1e-3
    """Adam's, on the meta-parameters."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine, linear: to 0 over --episodes."""
    clip: float = 0.25
    """Global norm to which the meta-gradient is clipped; 0: not."""
    accumulate_tasks: int | None = None
    """Compute this many episodes of a meta-step at once, to save memory."""
    steps_per_call: int = 1
    """Meta-steps in one compiled call; more hide an accelerator's dispatch."""
    validate_every: int = 1_000
    """Episodes between validations; the best parameters are kept."""
    validation_episodes: int = 200
    """Episodes of one validation."""
    save_every: int = 1_000
    """Episodes between checkpoints."""


@dataclass(frozen=True)
class Test:
    """Meta-test."""

    test_episodes: int = 600
    """Episodes of the final evaluation, the same for every method."""
    test_batch: int = 8
    """Of these, how many at once."""
    test_seed: int = 0
    """Which episodes."""


@dataclass(frozen=True)
class Run:
    """Where and how to run."""

    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    seed: int = 0
    """Of initialisation and meta-training episodes."""
    seeds: int = 1
    """Repeat with this many seeds from --seed on, and aggregate."""
    workdir: Path | None = None
    """The run folder; default runs/few_shot/DATASET-WAYwSHOTs-SEED."""
    resume: Path | None = None
    """Go on with the run in this folder."""
    evaluate: Path | None = None
    """Evaluate the run in this folder again: with --way, --shot, --query-norm ..."""
    tensorboard: bool = False
    """Write TensorBoard files too."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class Config:
    data: Data = field(default_factory=Data)
    learner: LearnerOptions = field(default_factory=LearnerOptions)
    methods: Methods = field(default_factory=Methods)
    rule: RuleOptions = field(default_factory=RuleOptions)
    budget: Budget = field(default_factory=Budget)
    test: Test = field(default_factory=Test)
    run: Run = field(default_factory=Run)


GROUPS = {f.name for f in dataclasses.fields(Config)}


def groups(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def may_change(config: Config) -> tuple[str, ...]:
    """What may differ when a run goes on. A schedule's end is part of the recipe."""
    names = (
        "run.preset", "run.workdir", "run.resume", "run.evaluate", "run.tensorboard",
        "run.debug", "data.data_dir", "budget.minutes",
    )  # fmt: skip
    ends = config.budget.schedule != "constant"
    return names if ends else (*names, "budget.episodes")


def with_flags(config: Any, **flags: Any) -> Any:
    """Set options by their flat names; raises ValueError for an unknown one.

    Works for any dataclass whose fields are groups of options, as do `to_json` and
    `from_json`.
    """
    for name, value in flags.items():
        for group in groups(config):
            if name in {f.name for f in dataclasses.fields(getattr(config, group))}:
                changed = dataclasses.replace(getattr(config, group), **{name: value})
                config = dataclasses.replace(config, **{group: changed})
                break
        else:
            raise ValueError(f"there is no option {name!r}")
    return config


def to_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(saved: dict[str, Any], config: Any = None) -> Any:
    """The config of a run folder; options added since then keep those of ``config``."""
    config = Config() if config is None else config
    for group in groups(config) & saved.keys():
        for f in dataclasses.fields(getattr(config, group)):
            if f.name not in saved[group]:
                continue
            value = saved[group][f.name]
            if isinstance(value, list):
                value = tuple(value)
            if value is not None and "Path" in str(f.type):
                value = Path(value)
            config = with_flags(config, **{f.name: value})
    return config


def parse(arguments: list[str]) -> Config:
    """Read the command line; a preset or a resumed run gives the defaults.

    Raises:
      ValueError: an unknown preset, or options that cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
    """
    from experiments.presets import preset

    default = Config()
    named = value_of("--preset", arguments)
    if named is not None:
        default = preset(named)
    for flag in ("--resume", "--evaluate"):
        folder = value_of(flag, arguments)
        if folder is not None:
            default = from_json(read_config(Path(folder))["config"])
            default = with_flags(default, resume=None, evaluate=None, workdir=None)
            if named is not None:
                raise ValueError(
                    f"{flag} takes its options from the run; drop --preset"
                )
    config = tyro.cli(
        Config,
        args=arguments,
        default=default,
        description=_DESCRIPTION,
        prog="python -m experiments.few_shot",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    names = [part for item in config.methods.algorithms for part in item.split(",")]
    config = with_flags(config, algorithms=tuple(name for name in names if name))
    check(config)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.json; give the folder "
            "that a run printed"
        ) from None


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the data are.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    chosen = config.methods.algorithms
    if not chosen:
        raise ValueError(f"--algorithms is empty: choose from {', '.join(METHODS)}")
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"--algorithms {name}: {did_you_mean(name, METHODS)}")
    repeated = [name for name in chosen if chosen.count(name) > 1]
    if repeated:
        raise ValueError(f"--algorithms names {repeated[0]} twice: drop one")
    tuned = [name for name in chosen if name in HAND_MADE]
    if tuned and not any(name in LEARNS_INIT for name in chosen):
        raise ValueError(
            f"--algorithms {tuned[0]} starts from a learned theta_0: add one of "
            f"{', '.join(LEARNS_INIT)}"
        )
    if config.methods.draw_init and tuned and "meta-lstm" in chosen:
        raise ValueError(
            "--draw-init learns no theta_0 for the hand-made rules: drop "
            f"{', '.join(tuned)}, or choose scratch"
        )
    _check_ranges(config)
    schedule = config.budget.schedule
    if schedule != "constant" and config.budget.minutes is not None:
        raise ValueError(f"--schedule {schedule} needs --episodes, not --minutes")
    if config.methods.query_norm == "all" and config.run.evaluate is None:
        raise ValueError(
            "--query-norm all goes with --evaluate RUN; train with one mode"
        )
    if "frozen" in (config.methods.query_norm,) and (
        config.methods.train_query_norm != "frozen" and config.run.evaluate is None
    ):
        raise ValueError(
            "--query-norm frozen falls to chance unless meta-training uses the same "
            "averages: add --train-query-norm frozen"
        )
    if config.run.resume is not None and config.run.workdir is not None:
        raise ValueError("--resume RUN goes on in that folder; drop --workdir")
    if config.run.evaluate is not None and config.run.resume is not None:
        raise ValueError("--evaluate and --resume: choose one")


def _check_ranges(config: Config) -> None:
    at_least = {
        "way": 2, "shot": 1, "queries": 1, "train_queries": 1, "image_size": 8,
        "filters": 1, "blocks": 1, "steps": 1, "test_steps": 1, "support_batch": 1,
        "scratch_steps": 1, "finetune_steps": 1, "imagined": 1, "train_way": 2,
        "train_shots": 1, "train_batch": 1, "memory_slots": 4, "memory_hidden": 1,
        "hidden": 0, "meta_batch": 1, "clip": 0, "accumulate_tasks": 1,
        "steps_per_call": 1, "validate_every": 1, "validation_episodes": 2,
        "save_every": 1, "test_episodes": 2, "test_batch": 1, "episodes": 1,
        "seeds": 1, "seed": 0, "test_seed": 0,
    }  # fmt: skip
    above_zero = (
        "learning_rate", "inner_rate", "minutes", "adam_rate", "outer_step", "proximal",
    )  # fmt: skip
    for group in GROUPS:
        for name, value in vars(getattr(config, group)).items():
            flag = f"--{name.replace('_', '-')}"
            low = at_least.get(name)
            if low is not None and value is not None and value < low:
                raise ValueError(f"{flag} {value}: choose {low} or more")
            if name in above_zero and value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: choose a number above 0")
    budget = config.budget
    chunk = budget.accumulate_tasks
    if chunk is not None and budget.meta_batch % chunk:
        raise ValueError(
            f"--accumulate-tasks {chunk} does not divide --meta-batch "
            f"{budget.meta_batch}: choose a divisor"
        )
    if config.methods.train_way is not None and not config.learner.tied_head:
        fixed = [name for name in config.methods.algorithms if name in LEARNS_INIT]
        if fixed:
            raise ValueError(
                f"--train-way {config.methods.train_way}: the head of {fixed[0]} has "
                "--way classes; add --tied-head"
            )
    support, batch = config.data.way * config.data.shot, config.methods.support_batch
    if batch is not None and support % batch:
        raise ValueError(
            f"--support-batch {batch} does not divide the {support} images of a "
            "support set: choose a divisor"
        )


def as_flags(message: str) -> str:
    """Say the library's advice in flags: 'choose way <= 5' as 'choose --way <= 5'."""
    names = "|".join(sorted(_all_names(), key=len, reverse=True))
    return re.sub(
        rf"\b(choose|or) ({names})\b(?= *[<>=+])",
        lambda m: f"{m[1]} --{m[2].replace('_', '-')}",
        message,
    )


def _all_names() -> set[str]:
    config = Config()
    return {f.name for g in GROUPS for f in dataclasses.fields(getattr(config, g))}


def value_of(flag: str, arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def did_you_mean(name: str, choices: Any) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    hint = f"did you mean {close[0]}? " if close else "not known. "
    return f"{hint}Choose from {', '.join(choices)}"


_DESCRIPTION = (
    "Learn to learn from few examples: meta-train, meta-test, compare.\n\n"
    + ("Algorithms: " + "; ".join(f"{name} ({what})" for name, what in METHODS.items()))
)
