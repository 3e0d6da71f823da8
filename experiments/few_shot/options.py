"""The options that methods share: data, test, run, what is adapted, meta-training.

A learner's fields are the arguments of its constructor in `metalstm.nn`. No jax here,
so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from experiments.common.cli import Flat
from experiments.common.devices import Devices

AtLeast1 = Annotated[int, Meta(ge=1)]
AtLeast2 = Annotated[int, Meta(ge=2)]
NotNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Data:
    """What to learn on; the same for every method of a table."""

    dataset: str = "glyphs"
    """glyphs (needs no download), omniglot, mini-imagenet, folders (your images, one
    folder a class), arrays (your .npz of x and y, such as spectrograms), or tfds:NAME
    for any TFDS image-classification set."""
    data_dir: Path | None = None
    """Where the data set is; arrays: the file. For TFDS sets also the environment's
    TFDS_DATA_DIR."""
    split: Literal["alphabets", "characters"] = "alphabets"
    """Omniglot: test on other alphabets, or on other characters of the same ones."""
    image_size: Annotated[int, Meta(ge=8)] | None = None
    """Resize to this many pixels square; default: the data set's own choice."""
    skip_corrupt: bool = False
    """folders: omit files that cannot be decoded, and count them; default: name them
    and stop."""
    way: AtLeast2 = 5
    """Classes of an episode."""
    shot: AtLeast1 = 1
    """Support images of each class."""
    queries: AtLeast1 = 15
    """Query images of each class."""
    normalise: Literal["none", "imagenet"] = "none"
    """Subtract ImageNet's mean and divide by its standard deviation."""


@dataclass(frozen=True)
class Test:
    """Meta-test; the same for every method of a table."""

    test_episodes: AtLeast2 = 600
    """Episodes of the final evaluation."""
    test_batch: AtLeast1 = 8
    """Of these, how many at the same time."""
    test_seed: NotNegative = 0
    """Which episodes."""


@dataclass(frozen=True)
class Run:
    """What to run, and where."""

    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    algorithms: tuple[str, ...] = ("meta-lstm", "maml", "scratch", "nearest-neighbour")
    """Several are compared in one table, on the same episodes; or all."""
    seed: NotNegative = 0
    """Of initialisation and meta-training episodes."""
    seeds: AtLeast1 = 1
    """Repeat with this many seeds from --seed on, and aggregate."""
    workdir: Path | None = None
    """The run folder; default runs/few_shot/DATASET-WAYwSHOTs-SEED."""
    resume: Path | None = None
    """Resume the run in this folder."""
    evaluate: tuple[Path, ...] = ()
    """Test the runs in these folders again, in one table: with --way, --shot,
    --query-norm (a mode, or all), --num-test-steps ..."""
    tensorboard: bool = False
    """Write TensorBoard files too."""
    debug: bool = False
    """Show tracebacks."""


@dataclass(frozen=True)
class Training:
    """Meta-training."""

    episodes: AtLeast1 = 10_000
    """Meta-training episodes of each method."""
    minutes: Positive | None = None
    """Stop each method's meta-training after this long (instead of --episodes)."""
    meta_batch: AtLeast1 = 4
    """Episodes of one meta-step."""
    learning_rate: Positive = 1e-3
    """Adam's, on the meta-parameters."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine, linear: to 0 over --episodes."""
    clip: Annotated[float, Meta(ge=0)] = 0.25
    """Global norm to which the meta-gradient is clipped; 0: not."""
    accumulate_tasks: AtLeast1 | None = None
    """Compute this many episodes of a meta-step at a time, to save memory."""
    steps_per_call: AtLeast1 = 1
    """Meta-steps in one compiled call; more hide an accelerator's dispatch."""
    validate_every: AtLeast1 = 1_000
    """Episodes between validations; the best parameters are kept."""
    validation_episodes: AtLeast2 = 200
    """Episodes of one validation."""
    save_every: AtLeast1 = 1_000
    """Episodes between checkpoints."""
    train_shots: AtLeast1 | None = None
    """Support images of each class in meta-training; default --shot."""
    rotations: bool = False
    """Meta-train with turned characters as classes of their own (Omniglot's custom)."""
    augment: Literal["none", "shift", "crop-flip", "crop-flip-jitter"] = "none"
    """What happens to images in meta-training: shifts by up to 2 pixels, or resized
    crops and flips, or these and colour jitter."""


# -- learners --------------------------------------------------------------------------

Name = Literal["conv4", "mlp", "resnet12"]
Norm = Literal["batch", "group", "layer", "none"]
Initializer = Literal["torch", "flax"]
ScaleInit = Literal["ones", "uniform"]
Widths = tuple[AtLeast1, ...]


@dataclass(frozen=True)
class Learner:
    """What is adapted to each episode."""

    learner: Name = "conv4"
    """The network; --help NAME has the options of each."""
    initializer: Initializer = "torch"
    """Initial weights: torch's U(+-1/sqrt(fan_in)), as published, or lecun_normal."""
    zero_head: bool = False
    """Start the last layer at zero."""
    tied_head: bool = False
    """All classes start from one learned vector: any --way in training and test."""


@dataclass(frozen=True)
class Normalised(Learner):
    norm: Norm = "batch"
    """Normalisation layers; group and layer look at one image only."""
    momentum: float = 0.05
    """Weight of the old value in the batch norm's moving average (1-shot as published:
    0.1, 5-shot: 0.05)."""
    scale_init: ScaleInit = "ones"
    """Initial scale of the norm layers."""


@dataclass(frozen=True)
class Conv4(Normalised):
    """Four blocks of convolution, norm, ReLU and halving."""

    filters: AtLeast1 = 32
    """Filters of each layer."""
    num_blocks: AtLeast1 = 4
    """Number of blocks."""
    downsample: Literal["max_pool", "stride"] = "max_pool"
    """Halve by max-pooling, or by convolutions of stride 2."""
    final_relu: bool = True
    """The last block ends in a ReLU; without, features keep their sign."""


@dataclass(frozen=True)
class Mlp(Learner):
    """A multi-layer perceptron."""

    learner: Name = "mlp"
    """The network; --help NAME has the options of each."""
    widths: Widths = (64, 64)
    """Hidden units of each layer."""


@dataclass(frozen=True)
class ResNet12(Normalised):
    """Four residual blocks of three convolutions each."""

    learner: Name = "resnet12"
    """The network; --help NAME has the options of each."""
    widths: Widths = (32, 80, 160, 320)
    """Filters of each block."""


LEARNERS: dict[str, type[Learner]] = {
    "conv4": Conv4,
    "mlp": Mlp,
    "resnet12": ResNet12,
}

# -- all of it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    """What is the same for every method of a table."""

    data: Flat[Data] = field(default_factory=Data)
    test: Flat[Test] = field(default_factory=Test)
    run: Flat[Run] = field(default_factory=Run)
    devices: Flat[Devices] = field(default_factory=Devices)


@dataclass(frozen=True)
class Options(Common):
    methods: dict[str, Any] = field(default_factory=dict)
    """Name -> the options of the method, of `experiments.few_shot.methods.kind_of`."""


@dataclass(frozen=True)
class Retest:
    """What a finished run may be tested again with."""

    query_norm: (
        Literal["support", "support+1", "transductive", "frozen", "all"] | None
    ) = None
    """Which statistics a batch norm uses for a query; all: every mode that makes
    sense. Default: the run's."""
    num_test_steps: AtLeast1 | None = None
    """Inner updates. Default: the run's."""
