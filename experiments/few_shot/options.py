"""The options of few_shot, typed; no jax here, so that --help is quick.

Flags are flat (``--way``), the groups only order them. `experiments.few_shot.command_line` reads
and checks them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.common.devices import MAY_CHANGE, Devices
from experiments.common.saved_options import read_options

QueryNorm = Literal["support", "support+1", "transductive", "frozen"]


@dataclass(frozen=True)
class Data:
    """What to learn on."""

    dataset: str = "glyphs"
    """glyphs (needs no download), omniglot, mini-imagenet, folders (your images, one
    folder a class), arrays (your .npz of x and y, such as spectrograms), or tfds:NAME
    for any TFDS image-classification set."""
    data_dir: Path | None = None
    """Where the data set is; arrays: the file. For TFDS sets also the environment's
    TFDS_DATA_DIR."""
    split: Literal["alphabets", "characters"] = "alphabets"
    """Omniglot: test on other alphabets, or on other characters of the same ones."""
    image_size: int | None = None
    """Resize to this many pixels square; default: the data set's own choice."""
    skip_corrupt: bool = False
    """folders: leave out files that cannot be decoded, and count them; default: name
    them and stop."""
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
    """Support images of each class in meta-training; default --shot."""
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
    pretrain_batch: int | None = None
    """Images of one step of the transfer floors' pre-training; default as many as an
    episode has."""
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
    evaluate: tuple[Path, ...] = ()
    """Test the runs in these folders again, in one table: with --way, --shot,
    --query-norm ..."""
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
    devices: Devices = field(default_factory=Devices)
    run: Run = field(default_factory=Run)
    own: Annotated[dict[str, dict[str, Any]], tyro.conf.Fixed, tyro.conf.Suppress] = (
        field(default_factory=dict)
    )
    """Per method, the flags that it sets otherwise; `experiments.few_shot.methods.config_for`
    applies them. They come from a preset: what is said on the command line holds for
    every method."""


GROUPS = {f.name for f in dataclasses.fields(Config) if f.name != "own"}


def groups(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config) if f.name != "own"}


def may_change(config: Config) -> tuple[str, ...]:
    """What may differ when a run goes on. A schedule's end is part of the recipe."""
    names: tuple[str, ...] = (
        "run.preset", "run.workdir", "run.resume", "run.evaluate", "run.tensorboard",
        "run.debug", "data.data_dir", "budget.minutes", *MAY_CHANGE,
    )  # fmt: skip
    # a new value holds for all methods, and so leaves none of them its own
    chosen = config.methods.algorithms
    names += tuple(f"own.{method}.minutes" for method in chosen)
    schedules = {config.budget.schedule}
    schedules |= {own["schedule"] for own in config.own.values() if "schedule" in own}
    if schedules != {"constant"}:
        return names
    own_ends = (f"own.{method}.episodes" for method in chosen)
    return (*names, "budget.episodes", *own_ends)


def with_flags(config: Any, **flags: Any) -> Any:
    """Set options by their flat names, for every method.

    Works for any dataclass whose fields are groups of options, as do `to_json` and
    `from_json`.

    Raises:
      ValueError: there is no such option.
    """
    if getattr(config, "own", None):
        config = dataclasses.replace(config, own=without(config.own, flags))
    for name, value in flags.items():
        for group in groups(config):
            if name in {f.name for f in dataclasses.fields(getattr(config, group))}:
                changed = dataclasses.replace(getattr(config, group), **{name: value})
                config = dataclasses.replace(config, **{group: changed})
                break
        else:
            raise ValueError(f"there is no option {name!r}")
    return config


def without(
    own: Mapping[str, Mapping[str, Any]], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Drop options from every method's own."""
    dropped = set(names)
    kept = {
        method: {name: value for name, value in flags.items() if name not in dropped}
        for method, flags in own.items()
    }
    return {method: flags for method, flags in kept.items() if flags}


def to_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(saved: Any, config: Any = None) -> Any:
    """The config of a run folder; options added since then keep those of ``config``.

    Raises:
      ValueError: an option is not of its type.
    """
    config = Config() if config is None else config
    flat: dict[str, Any] = {}
    for group in groups(config):
        hints = typing.get_type_hints(type(getattr(config, group)))
        flat |= hints
        options = read_options(group, saved.get(group, {}), hints)
        changed = dataclasses.replace(getattr(config, group), **options)
        config = dataclasses.replace(config, **{group: changed})
    if "own" in saved:
        by_method = read_options("own", saved, {"own": dict})["own"]
        own = {m: read_options(m, flags, flat) for m, flags in by_method.items()}
        config = dataclasses.replace(config, own=own)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """What a run wrote of its options, methods and data.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: its config.json is damaged.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document["config"], dict):
            raise TypeError("config is no mapping")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no config.json; give the folder "
            "that a run printed"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): put a copy of it "
            "back, or start again in another --workdir"
        ) from None
    return document


def value_of(flag: str, arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def values_of(flag: str, arguments: list[str]) -> list[str]:
    """The values of a flag that takes several."""
    if flag not in arguments:
        one = value_of(flag, arguments)
        return [] if one is None else [one]
    after = arguments[arguments.index(flag) + 1 :]
    ends = (i for i, argument in enumerate(after) if argument.startswith("--"))
    return after[: next(ends, len(after))]


def did_you_mean(name: str, choices: Any) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    hint = f"did you mean {close[0]}? " if close else "not known. "
    return f"{hint}Choose from {', '.join(choices)}"
