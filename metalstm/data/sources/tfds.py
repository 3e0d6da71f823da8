"""Image-classification sets of tensorflow-datasets, regrouped by class.

Read through `as_data_source`, which needs no TensorFlow; decoded once and cached.
Nothing here downloads or prepares a data set: TFDS needs TensorFlow for most, and the
user should decide on a download. The errors have the command.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metalstm.data.cache import (
    PathLike,
    Split,
    cache_folder,
    cached_dataset,
    fingerprint,
)
from metalstm.data.images import fit_to_set
from metalstm.data.pools import SPLITS, Dataset, join_classes
from metalstm.data.splits import check_disjoint, split_classes

__all__ = ["check_label", "load_tfds", "open_builder"]


_VERSION = 2  # of what the cache holds
_UNLABELLED = -1  # by TFDS's convention


def open_builder(name: str, data_dir: PathLike | None = None) -> Any:
    """Return the TFDS builder of a data set that is prepared and can be read.

    ``data_dir`` is TFDS's folder; default TFDS_DATA_DIR, then TFDS's default.

    Raises:
      ImportError: without tensorflow-datasets, naming the extra.
      FileNotFoundError: if the data set is not prepared; the message has the command,
        and that TensorFlow must be installed for it where it is not.
      ValueError: if TFDS knows no such data set, or it is prepared as tfrecord.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ImportError(
            f"reading {name} needs tensorflow-datasets: pip install 'metalstm[tfds]'"
        ) from None
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    folder = None if folder is None else os.path.expanduser(os.fspath(folder))
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.registered.DatasetNotFoundError:
        raise ValueError(
            f"TFDS knows no data set {name!r}, and there is none of that name in "
            f"{folder or 'its default folder'}; check the spelling, or import the "
            f"module with its builder first"
        ) from None
    where = str(builder.data_path)
    how = (
        f"tfds.builder({name!r}, data_dir={str(builder._data_dir_root)!r}, "
        f"file_format='array_record').download_and_prepare()"
    )
    if not os.path.exists(os.path.join(where, "dataset_info.json")):
        if importlib.util.find_spec("tensorflow") is None:
            raise FileNotFoundError(
                f"{name} is not prepared: nothing at {where} (data_dir or "
                f"TFDS_DATA_DIR says where to look). TFDS needs TensorFlow to prepare "
                f"it, though not to read it, and TensorFlow is not installed: pip "
                f"install tensorflow, here or on another machine, then {how}"
            )
        raise FileNotFoundError(
            f"{name} is not prepared: nothing at {where} (data_dir or TFDS_DATA_DIR "
            f"says where to look). Prepare it with {how}"
        )
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{name} at {where} is prepared as {builder.info.file_format.value}, which "
            f"only TensorFlow reads. Prepare it again, in another folder: {how}"
        )
    return builder


def load_tfds(
    name: str,
    data_dir: PathLike | None = None,
    *,
    image_key: str = "image",
    label_key: str = "label",
    image_size: int | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    max_per_class: int | None = None,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load any TFDS image-classification set for few-shot learning.

    The images of all its splits are pooled and regrouped by label: what is divided into
    training, validation and test are the *classes*.

    Images without a label (-1, as TFDS marks them) and classes without an image are
    omitted; ``info`` counts the former as ``"unlabelled"`` and names the latter as
    ``"empty_classes"``.

    Args:
      name: as for `tfds.builder`, with "/config" and ":version" if wanted.
      data_dir: TFDS's folder; default TFDS_DATA_DIR, then TFDS's default.
      image_key, label_key: the features to read.
      image_size: resize the middle square of every image to this; needed when the
        images are not all of one size.
      splits: class names for "train", "validation" and "test"; classes named nowhere
        are omitted. Default: a seeded division in mini-ImageNet's proportions.
      seed: of that division.
      max_per_class: keep only this many images of a class, the first ones.
      cache_dir: where the decoded images are kept; see `metalstm.data.cache`.

    Raises:
      ImportError, FileNotFoundError, ValueError: see `open_builder`; and ValueError for
        a feature or class that is not there, a label that is no class, images of
        several sizes or with values outside a byte.
    """
    builder = open_builder(name, data_dir)
    features = builder.info.features
    for argument, feature in (("image_key", image_key), ("label_key", label_key)):
        if feature not in features:
            raise ValueError(
                f"{argument}={feature!r}: the features of {name} are "
                f"{', '.join(features)}"
            )
    names = list(getattr(features[label_key], "names", ()) or ())
    if not names:
        raise ValueError(f"label_key={label_key!r} of {name} is not a class label")
    if splits is None:
        splits = split_classes(names, seed=seed)
    check_disjoint(splits)
    if unknown := sorted({n for part in splits.values() for n in part} - set(names)):
        raise ValueError(
            f"splits names {', '.join(unknown[:5])}, which are not classes of {name}; "
            f"those begin with {', '.join(names[:5])}"
        )
    wanted = {split: tuple(splits[split]) for split in SPLITS}
    key = fingerprint(
        [_VERSION, builder.info.full_name, _sizes(builder), image_key, label_key]
        + [image_size, max_per_class, *wanted.items()]
    )

    def build() -> tuple[dict[str, Split], dict[str, Any]]:
        images, unlabelled = _by_label(
            builder, image_key, label_key, image_size, max_per_class
        )
        info: dict[str, Any] = {"tfds": builder.info.full_name}
        if unlabelled:
            info["unlabelled"] = unlabelled
        empty = [n for s in SPLITS for n in wanted[s] if not images.get(names.index(n))]
        if empty:
            info["empty_classes"] = empty
        parts = {split: _stack(wanted[split], names, images) for split in SPLITS}
        return parts, info

    path = cache_folder(cache_dir) / f"tfds-{key}.npz"
    return cached_dataset(name.replace("/", "-"), path, build)


def check_label(label: int, num_classes: int, where: str) -> None:
    """Refuse a label outside [0, num_classes), naming ``where`` it is."""
    if not 0 <= label < num_classes:
        unlabelled = " (TFDS's mark of an unlabelled image)" * (label == _UNLABELLED)
        raise ValueError(
            f"{where} split has an image of label {label}{unlabelled}, outside [0, "
            f"{num_classes}): prepare it again, or omit such images"
        )


def _sizes(builder: Any) -> list[tuple[str, int]]:
    return sorted((n, split.num_examples) for n, split in builder.info.splits.items())


def _by_label(
    builder: Any, image_key: str, label_key: str, size: int | None, limit: int | None
) -> tuple[dict[int, list[np.ndarray]], int]:
    """Return the images of each label, and how many images have none."""
    images: dict[int, list[np.ndarray]] = {}
    unlabelled, shape = 0, None
    num_classes = len(builder.info.features[label_key].names)
    for split in sorted(builder.info.splits):
        for example in builder.as_data_source(split=split):
            label = int(example[label_key])
            if label == _UNLABELLED:
                unlabelled += 1
                continue
            check_label(label, num_classes, f"{builder.info.full_name}'s {split}")
            of_class = images.setdefault(label, [])
            if limit is not None and len(of_class) >= limit:
                continue
            image = fit_to_set(
                example[image_key], builder.info.full_name, size=size, shape=shape
            )
            shape = image.shape
            of_class.append(image)
    return images, unlabelled


def _stack(
    wanted: Sequence[str], names: Sequence[str], images: dict[int, list[np.ndarray]]
) -> Split:
    index = {name: i for i, name in enumerate(names)}
    # A class without a single image is nothing to draw from.
    present = [name for name in wanted if images.get(index[name])]
    if not present:
        raise ValueError(f"none of the classes {', '.join(wanted[:5])} has an image")
    stacked, counts = join_classes([np.stack(images.pop(index[n])) for n in present])
    return Split(stacked, counts, tuple(present))
