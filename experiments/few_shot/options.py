"""The options that methods share: data, test, run, meta-training.

No jax here, so that --help is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from experiments.common import cli
from experiments.common.cli import Count, Flat, Natural, Pair, Positive, said
from experiments.common.devices import Devices
from experiments.few_shot.presets import read_presets


class Data(cli.Options, frozen=True):
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
    image_size: Annotated[int, msgspec.Meta(ge=8)] | None = None
    """Resize to this many pixels square; default: the data set's own choice."""
    skip_corrupt: bool = False
    """folders: omit files that cannot be decoded, and count them; default: name them
    and stop."""
    way: Pair = 5
    """Classes of an episode."""
    shot: Count = 1
    """Support images of each class."""
    queries: Count = 15
    """Query images of each class."""
    normalise: Literal["none", "imagenet"] = "none"
    """Subtract ImageNet's mean and divide by its standard deviation."""


class Test(cli.Options, frozen=True):
    """Meta-test; the same for every method of a table."""

    test_episodes: Pair = 600
    """Episodes of the final evaluation."""
    test_batch: Count = 8
    """Of these, how many at the same time."""
    test_seed: Natural = 0
    """Which episodes."""


_PRESETS = "Start from a named recipe, which other flags override: " + ", ".join(
    read_presets()
)


class Run(cli.Options, frozen=True):
    """What to run, and where."""

    preset: said(str | None, _PRESETS) = None  # type: ignore[valid-type]
    algorithms: tuple[str, ...] = ("meta-lstm", "maml", "scratch", "nearest-neighbour")
    """Several are compared in one table, on the same episodes; or all."""
    seed: Natural = 0
    """Of initialisation and meta-training episodes."""
    seeds: Count = 1
    """Repeat with this many seeds from --seed on, and aggregate."""
    workdir: Path | None = None
    """The run folder; default runs/few_shot/DATASET-WAYwSHOTs-SEED."""
    resume: Path | None = None
    """Resume the run in this folder."""
    evaluate: tuple[Path, ...] = ()
    """Test the runs in these folders again, in one table: with --way, --shot,
    --query-norm (a mode, or all), --num-test-steps ... The names of the package's
    trained methods, and files of such, will do too."""
    tensorboard: bool = False
    """Write TensorBoard files too."""
    debug: bool = False
    """Show tracebacks."""


class Training(cli.Options, frozen=True):
    """Meta-training."""

    episodes: Natural = 10_000
    """Meta-training episodes of each method; 0: the network of --init-from is tested
    as it is."""
    minutes: Positive | None = None
    """Stop each method's meta-training after this long (instead of --episodes)."""
    meta_batch: Count = 4
    """Episodes of one meta-step."""
    learning_rate: Positive = 1e-3
    """Adam's, on the meta-parameters."""
    theta_learning_rate: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Adam's on theta_0, where the rule's is another; 0: theta_0 stays as it is."""
    init_from: str | None = None
    """Start theta_0 and its batch statistics, not the rule, from a trained method: a
    run folder, FOLDER:METHOD, a file of metalstm.save, or the name of one that is
    installed. Its network must be of the same options."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """cosine, linear: to 0 over --episodes."""
    clip: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    """Global norm to which the meta-gradient is clipped; 0: not."""
    accumulate_tasks: Count | None = None
    """Compute this many episodes of a meta-step at a time, to save memory."""
    steps_per_call: Count = 1
    """Meta-steps in one compiled call; more hide an accelerator's dispatch."""
    validate_every: Count = 1_000
    """Episodes between validations; the best parameters are kept."""
    validation_episodes: Pair = 200
    """Episodes of one validation."""
    save_every: Count = 1_000
    """Episodes between checkpoints."""
    train_shots: Count | None = None
    """Support images of each class in meta-training; default --shot."""
    rotations: bool = False
    """Meta-train with rotated characters as further classes (Omniglot's custom)."""
    augment: Literal["none", "shift", "crop-flip", "crop-flip-jitter"] = "none"
    """What happens to images in meta-training: shifts by up to 2 pixels, or resized
    crops and flips, or these and colour jitter."""


class Common(cli.Options, frozen=True):
    """What is the same for every method of a table."""

    data: Flat[Data] = Data()
    test: Flat[Test] = Test()
    run: Flat[Run] = Run()
    devices: Flat[Devices] = Devices()


class Retest(cli.Options, frozen=True):
    """What a finished run may be tested again with."""

    query_norm: (
        Literal["support", "support+1", "transductive", "frozen", "all"] | None
    ) = None
    """Which statistics a batch norm uses for a query; all: every mode that makes
    sense. Default: the run's."""
    num_test_steps: Count | None = None
    """Inner updates. Default: the run's."""


class Options(Common, frozen=True):
    methods: dict[str, Any] = msgspec.field(default_factory=dict)
    """Name -> the options of the method, of `experiments.few_shot.methods.kind_of`."""
    retest: Retest = Retest()


def with_methods(
    common: Common, methods: dict[str, Any], retest: Retest | None = None
) -> Options:
    parts = common.data, common.test, common.run, common.devices
    return Options(*parts, methods, retest or Retest())
