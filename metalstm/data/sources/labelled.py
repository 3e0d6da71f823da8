"""Ordinary classification data, images with labels: what problems train on.

The readers are those of the few-shot sources, and so is the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metalstm.base import Array
from metalstm.data.cache import PathLike, cache_folder, cached, fingerprint
from metalstm.data.images import fit_to_set
from metalstm.data.pools import Dataset, checksum
from metalstm.data.sources.glyphs import load_glyphs
from metalstm.data.sources.tfds import check_label, open_builder

__all__ = ["ImageData", "LabelledImages", "load_image_data"]


_VERSION = 1  # of what the cache holds
_HELD_OUT = 8  # every 8th image is held out where a source has no test split


class ImageData(NamedTuple):
    """One split. An *argument* of jitted functions, never closed over."""

    x: Array  # uint8 [M, H, W, ch] (or any floats [M, ...])
    y: Array  # int32 [M] labels (or float targets [M, d])


class LabelledImages(NamedTuple):
    """A data set with the same classes in training and in test."""

    name: str
    train: ImageData
    test: ImageData
    class_names: tuple[str, ...]
    checksum: str  # of all images and labels; goes into results

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_image_data(
    name: str = "glyphs",
    data_dir: PathLike | None = None,
    *,
    image_size: int | None = None,
    cache_dir: PathLike | None = None,
) -> LabelledImages:
    """Load images with labels: any TFDS image classification, or letters.

    ``"glyphs"`` needs no download: ten letters of `load_glyphs`, 28 x 28, 35 images of
    each in training and 5 in test. Every other name is one of TFDS, read as it was
    prepared (``"mnist"``, ``"fashion_mnist"``): its splits train and test, or without a
    test split every eighth image of train.

    Args:
      name: "glyphs", or as for `tfds.builder`.
      data_dir: TFDS's folder; default TFDS_DATA_DIR, then TFDS's default.
      image_size: resize the middle square of every image to this; needed when the
        images of a TFDS set are not all of one size.
      cache_dir: where the decoded images are kept; see `metalstm.data.cache`.

    Raises:
      ImportError, FileNotFoundError, ValueError: see `open_builder`; and ValueError for
        a set without images or labels, a label that is no class, images of several
        sizes or with values outside a byte, or an ``image_size`` for the glyphs.
    """
    if name == "glyphs":
        if image_size is not None:
            raise ValueError(f"image_size={image_size}: glyphs are 28 x 28; omit it")
        return _letters(load_glyphs(cache_dir))
    builder = open_builder(name, data_dir)
    features = builder.info.features
    # a FeaturesDict has no .get
    label = features["label"] if "label" in features else None  # noqa: SIM401
    names = getattr(label, "names", None)
    if "image" not in features or not names:
        raise ValueError(
            f"{name} has the features {', '.join(features)}: it needs 'image' and a "
            "'label' with class names; build an ImageData from its arrays instead"
        )
    sizes = sorted((n, split.num_examples) for n, split in builder.info.splits.items())
    key = fingerprint([_VERSION, builder.info.full_name, sizes, image_size])
    path = cache_folder(cache_dir) / f"labelled-{key}.npz"
    arrays = cached(path, lambda: _decode(builder, image_size))
    return _assemble(name, arrays, tuple(names))


def _letters(glyphs: Dataset, num_classes: int = 10) -> LabelledImages:
    per_class = glyphs.train.smallest
    x = np.asarray(glyphs.train.take(slice(num_classes * per_class)))
    labels = np.repeat(np.arange(num_classes), per_class)
    held_out = np.tile(np.arange(per_class) % _HELD_OUT == 0, num_classes)
    arrays = {
        "train.x": x[~held_out],
        "train.y": labels[~held_out],
        "test.x": x[held_out],
        "test.y": labels[held_out],
    }
    return _assemble("glyphs", arrays, glyphs.class_names["train"][:num_classes])


def _decode(builder: Any, size: int | None) -> dict[str, np.ndarray]:
    splits = builder.info.splits
    if "train" not in splits:
        raise ValueError(
            f"{builder.info.full_name} has the splits {', '.join(splits)}, none called "
            "train; build an ImageData from its arrays instead"
        )
    x, y = _read(builder, "train", size)
    if "test" in splits:
        test_x, test_y = _read(builder, "test", size)
    else:
        held_out = np.arange(len(y)) % _HELD_OUT == 0
        test_x, test_y = x[held_out], y[held_out]
        x, y = x[~held_out], y[~held_out]
    return {"train.x": x, "train.y": y, "test.x": test_x, "test.y": test_y}


def _read(builder: Any, split: str, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    num_classes = len(builder.info.features["label"].names)
    for example in builder.as_data_source(split=split):
        shape = images[0].shape if images else None
        image = fit_to_set(
            example["image"], builder.info.full_name, size=size, shape=shape
        )
        images.append(image)
        label = int(example["label"])
        check_label(label, num_classes, f"{builder.info.full_name}'s {split}")
        labels.append(label)
    if not images:
        raise ValueError(
            f"the {split} split of {builder.info.full_name} is empty: prepare it again"
        )
    return np.stack(images), np.array(labels, np.int32)


def _assemble(
    name: str, arrays: Mapping[str, np.ndarray], class_names: tuple[str, ...]
) -> LabelledImages:
    ordered = [arrays[f"{split}.{a}"] for split in ("train", "test") for a in "xy"]
    train_x, train_y, test_x, test_y = ordered
    return LabelledImages(
        name,
        ImageData(jnp.asarray(train_x), jnp.asarray(train_y, jnp.int32)),
        ImageData(jnp.asarray(test_x), jnp.asarray(test_y, jnp.int32)),
        class_names,
        checksum(*ordered),
    )
