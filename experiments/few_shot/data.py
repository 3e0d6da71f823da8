"""The data set that the flags name, and the specs of its episodes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from experiments.few_shot.options import Data, Training
from metalstm import data
from metalstm.data import Dataset, EpisodeSpec
from metalstm.runtime import sharding

_OMITTED = ("skipped", "skipped_files", "unlabelled", "empty_classes")


class Source(NamedTuple):
    dataset: Dataset
    test: EpisodeSpec

    def train(self, training: Training) -> EpisodeSpec:
        """The episodes of meta-training, before an algorithm's `train_sampler`."""
        return dataclasses.replace(
            self.test,
            shot=training.train_shots or self.test.shot,
            rotations=training.rotations,
            augment=_augment(training.augment),
        )

    def placed(self, mesh: Mesh | None, num_devices: int | None) -> Source:
        """The pools on every device that needs them.

        Args:
          mesh: of a meta-step.
          num_devices: how many evaluate; None is all.
        """
        every = sharding.task_mesh(num_devices=num_devices)
        dataset = self.dataset._replace(
            train=sharding.place(self.dataset.train, mesh),
            validation=sharding.place(self.dataset.validation, every),
            test=sharding.place(self.dataset.test, every),
        )
        return self._replace(dataset=dataset)

    def describe(self) -> dict[str, Any]:
        """What config.json and results.json keep of it."""
        normalise = self.test.normalise
        return {
            "name": self.dataset.name,
            "image_shape": list(self.dataset.image_shape),
            "checksum": self.dataset.checksum,
            # how many files, images or classes are omitted, and which
            **{k: v for k, v in self.dataset.info.items() if k in _OMITTED and v},
            "classes": {
                split: self.dataset.pool(split).num_classes for split in data.SPLITS
            },
            "normalise": None if normalise is None else [list(x) for x in normalise],
        }


def load_source(options: Data, methods: Mapping[str, Any]) -> Source:
    """Load the data, and refuse episodes that it cannot serve.

    Args:
      methods: the options of those that will be meta-trained.

    Raises:
      ValueError, FileNotFoundError: name the remedy.
    """
    dataset = _load(options)
    channels = dataset.image_shape[-1]
    normalise = None
    if options.normalise == "imagenet":
        if channels != 3:
            raise ValueError(
                f"--normalise imagenet is for 3 channels, and {dataset.name} has "
                f"{channels}: choose --normalise none"
            )
        normalise = data.IMAGENET
    test = EpisodeSpec(
        way=options.way,
        shot=options.shot,
        queries=options.queries,
        normalise=normalise,
    )
    source = Source(dataset, test)
    data.validate(test, dataset, "test")
    data.validate(test, dataset, "validation")
    for own in methods.values():
        meta_trained = dataclasses.replace(
            source.train(own.training),
            queries=getattr(own.method, "train_queries", None) or options.queries,
            way=getattr(own.method, "train_way", None) or options.way,
        )
        data.validate(meta_trained, dataset, "train")
    return source


def _load(options: Data) -> Dataset:
    name, folder = options.dataset, options.data_dir
    tfds_folder: Any = folder or os.environ.get("TFDS_DATA_DIR")
    sized: dict[str, Any] = {}
    if options.image_size is not None:
        sized["image_size"] = options.image_size
    if options.skip_corrupt and name != "folders":
        raise ValueError(
            f"--skip-corrupt is for --dataset folders: {name} must be whole; drop it, "
            "and prepare the data again should they be damaged"
        )
    if sized and name in ("glyphs", "arrays"):
        own = {"glyphs": "drawn at 28 pixels", "arrays": "used at their own size"}
        raise ValueError(f"--image-size: {name} are {own[name]}; drop it")
    if folder is None and name in ("folders", "arrays"):
        file = " FILE.npz" if name == "arrays" else ""
        raise ValueError(f"--dataset {name}: say where with --data-dir{file}")
    if name == "glyphs":
        return data.load_glyphs()
    if name == "omniglot":
        return data.load_omniglot(tfds_folder, split=options.split, **sized)
    if name == "mini-imagenet":
        return data.load_mini_imagenet(folder, **sized)
    if name == "folders":
        skip = options.skip_corrupt
        return data.load_image_folders(str(folder), skip_corrupt=skip, **sized)
    if name == "arrays":
        return data.load_arrays(str(folder))
    if name.startswith("tfds:"):
        return data.load_tfds(name.removeprefix("tfds:"), tfds_folder, **sized)
    raise ValueError(
        f"--dataset {name}: choose glyphs, omniglot, mini-imagenet, folders, "
        "arrays or tfds:NAME"
    )


def _augment(name: str) -> Any:
    augment = data.augment
    return {
        "none": None,
        "shift": augment.shift(2),
        "crop-flip": augment.crop_flip(),
        "crop-flip-jitter": augment.crop_flip_jitter(),
    }[name]
