"""Pools of examples on the device, grouped by class: episodes are drawn from them.

Shapes: C classes, M slots a class, H x W pixels, ch channels, D features.
"""

from __future__ import annotations

import bisect
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metalstm.base import Array
from metalstm.checks import check_at_least, check_choice

__all__ = [
    "IMAGENET",
    "SPLITS",
    "ClassPool",
    "Dataset",
    "Normalisation",
    "checksum",
    "evenly_spaced",
    "images_per_class",
    "make_pool",
    "pad_classes",
]

SPLITS = {"train": 0, "validation": 1, "test": 2}
"""The fixed integer of each split in the keys of `episode_key`."""


class Normalisation(NamedTuple):
    """Per-channel statistics of images in [0, 1]; x becomes (x - mean) / std."""

    mean: tuple[float, ...]  # [ch], or [1] for all channels
    std: tuple[float, ...]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The usual statistics of ImageNet's training images."""


class ClassPool(NamedTuple):
    """The images of one split. An *argument* of jitted functions, never closed over.

    Slots from ``counts[c]`` on are padding and are never drawn. ``groups``, when given,
    says which images of a class belong together (letters in one font face,
    drawings of one person): support and query of an episode then share no group.
    """

    images: Array  # uint8 [C, M, H, W, ch], or floats [C, M, ...] such as features
    counts: Array  # int32 [C], images of each class
    groups: Array | None = None  # int32 [C, M], ids in [0, M)

    @property
    def num_classes(self) -> int:
        return self.images.shape[0]


class Dataset(NamedTuple):
    """Three pools without a class in common, and what is known about them."""

    name: str
    train: ClassPool
    validation: ClassPool
    test: ClassPool
    class_names: dict[str, tuple[str, ...]]  # by split, in the pool's order
    image_shape: tuple[int, ...]  # (H, W, ch), or of what else an example is
    checksum: str  # of all images and counts; goes into results
    info: dict[str, Any]  # how it was split, versions, counts of merged or skipped

    def pool(self, split: str) -> ClassPool:
        """Return the pool of ``split``; raises ValueError if there is no such split."""
        check_choice("split", split, SPLITS)
        return getattr(self, split)


def make_pool(
    images: np.ndarray | Sequence[np.ndarray],
    counts: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> ClassPool:
    """Build a pool from uint8 [C, M, H, W, ch], or from C arrays [M_c, H, W, ch].

    Floats of any shape [C, M, ...] are kept as they are: an episode's x then holds
    the same numbers, neither divided by 255 nor quantised. Classes of unequal size are
    padded to the largest.

    Raises:
      ValueError: if there is no class, an image is neither uint8 nor float, the shape
        is another, a count is outside [1, M], or all images of a class are of one
        group.
    """
    if not isinstance(images, np.ndarray):
        images, counts = pad_classes(images)
    is_image = images.dtype == np.uint8 and images.ndim == 5
    is_float = jnp.issubdtype(images.dtype, jnp.floating) and images.ndim >= 3
    if not (is_image or is_float) or images.shape[0] == 0:
        raise ValueError(
            f"images must be uint8 of shape [C, M, H, W, ch], or floats [C, M, ...], "
            f"with C >= 1, got {images.dtype} {list(images.shape)}"
        )
    num_classes, num_slots = images.shape[:2]
    if counts is None:
        counts = np.full(num_classes, num_slots)
    if len(counts) != num_classes or np.min(counts) < 1 or np.max(counts) > num_slots:
        raise ValueError(
            f"counts must hold {num_classes} integers in [1, {num_slots}], got "
            f"{np.asarray(counts).tolist()[:10]}"
        )
    if groups is not None:
        _check_groups(groups, counts, (num_classes, num_slots))
    return ClassPool(
        jnp.asarray(images),
        jnp.asarray(counts, jnp.int32),
        None if groups is None else jnp.asarray(groups, jnp.int32),
    )


def pad_classes(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad C arrays [M_c, ...] to the largest: [C, M, ...] and counts int32 [C].

    Raises:
      ValueError: if there is no class, or dtypes or shapes differ.
    """
    if not images:
        raise ValueError("images is empty: a pool needs at least one class")
    counts = np.array([len(of_class) for of_class in images], np.int32)
    shape = (len(images), counts.max(), *images[0].shape[1:])
    padded = np.zeros(shape, images[0].dtype)
    for i, (row, of_class) in enumerate(zip(padded, images, strict=True)):
        if of_class.dtype != padded.dtype:
            raise ValueError(
                f"images[{i}] are {of_class.dtype} and images[0] {padded.dtype}: give "
                "all as uint8, or all as one type of floats"
            )
        if of_class.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"images[{i}] are of shape {list(of_class.shape[1:])} and images[0] of "
                f"{list(images[0].shape[1:])}: resize them to one"
            )
        row[: len(of_class)] = of_class
    return padded, counts


_PADDING = 3  # the memory of a pool is at most so many times that of its images


def images_per_class(
    counts: Mapping[str, int], max_per_class: int | None, where: str
) -> int:
    """Return how many images of a class to keep, at most.

    A pool gives every class the memory of the largest. ``max_per_class=None`` keeps
    all, unless that is more than three times the memory of the images: then it warns,
    names the largest class and says how many images are omitted.

    >>> images_per_class({"a": 3, "b": 5}, None, "train")
    5

    Raises:
      ValueError: ``max_per_class`` is below 1.
    """
    if max_per_class is not None:
        check_at_least("max_per_class", max_per_class, 1, "or None")
        return max_per_class
    sizes = np.array(list(counts.values()))
    largest = int(sizes.max(initial=0))

    def too_large(limit: int) -> bool:
        return len(sizes) * limit > _PADDING * np.minimum(sizes, limit).sum()

    if not too_large(largest):
        return largest
    limit = bisect.bisect_left(range(largest), True, lo=1, key=too_large) - 1
    name = max(counts, key=lambda name: counts[name])
    omitted = int(np.maximum(sizes - limit, 0).sum())
    warnings.warn(
        f"class {name!r} of {where} has {largest} images, and each of its {len(sizes)} "
        f"classes would take as much memory: {limit} images of a class are kept and "
        f"{omitted} are omitted; choose max_per_class, or divide the class",
        RuntimeWarning,
        stacklevel=3,
    )
    return limit


def evenly_spaced(items: Sequence, limit: int) -> Sequence:
    """Return at most ``limit`` of the items, in order.

    >>> evenly_spaced("abcdefgh", 3)
    ['a', 'e', 'h']
    """
    if len(items) <= limit:
        return items
    chosen = np.linspace(0, len(items) - 1, limit).round().astype(int)
    return [items[i] for i in chosen]


def checksum(*arrays: np.ndarray) -> str:
    """Return 16 hex digits that identify the arrays' shapes, dtypes and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def _check_groups(groups: np.ndarray, counts: np.ndarray, shape: tuple) -> None:
    if groups.shape != shape:
        raise ValueError(f"groups must have shape {list(shape)}, got {groups.shape}")
    for i, (of_class, count) in enumerate(zip(groups, counts, strict=True)):
        ids = np.unique(of_class[:count])
        if len(ids) < 2 or ids[0] < 0 or ids[-1] >= shape[1]:
            raise ValueError(
                f"groups[{i}] has the ids {ids.tolist()[:10]}; a class needs at least "
                f"two groups with ids in [0, {shape[1]})"
            )
