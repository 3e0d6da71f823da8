"""Pools of examples on the device, grouped by class: episodes are drawn from them.

Shapes: N examples, C classes, M_c examples of class c, M of the largest; H x W pixels,
ch channels, D features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
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
    "checksum_of_classes",
    "evenly_spaced",
    "in_tiles",
    "join_classes",
    "make_pool",
    "pool_of",
]

_TILE = (8, 128)  # numbers of the last two axes that a TPU keeps together

SPLITS = {"train": 0, "validation": 1, "test": 2}
"""The fixed integer of each split in the keys of `episode_key`."""


class Normalisation(NamedTuple):
    """Per-channel statistics of images in [0, 1]; x becomes (x - mean) / std."""

    mean: tuple[float, ...]  # [ch], or [1] for all channels
    std: tuple[float, ...]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The usual statistics of ImageNet's training images."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassPool:
    """The examples of one split. An *argument* of jitted functions, never closed over.

    They lie one class behind the other, so that a class takes the memory of its own
    examples, however large another is. ``groups``, when given, says which examples of a
    class belong together (letters in one font face, drawings of one person): support
    and query of an episode then share no group. `make_pool` builds a pool.

    A TPU's memory consists of tiles. An example of whole tiles is read where it lies;
    from any other layout the compiler copied the pool before it drew from it.
    """

    stored: Array  # [N, 8 t, 128], each example flat and padded to t tiles, or [N, ...]
    counts: Array  # int32 [C], examples of each class
    groups: Array | None  # int32 [C, M], ids in [0, M); of unequal classes padded
    smallest: int = dataclasses.field(metadata={"static": True})  # the least M_c
    # of an example: (H, W, ch) of uint8, or of numbers that are kept as they are
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def images(self) -> Array:
        """All examples, [N, ...]: a copy."""
        return self.take(slice(None))

    @property
    def num_classes(self) -> int:
        return self.counts.shape[0]

    @property
    def starts(self) -> Array:
        """int32 [C], where each class begins in ``images``."""
        return jnp.cumsum(self.counts) - self.counts

    def of_class(self, index: int) -> Array:
        """Return the examples [M_c, ...] of one class, outside of jitted functions.

        Raises:
          IndexError: there is no such class.
        """
        if not -self.num_classes <= index < self.num_classes:  # which JAX would clamp
            raise IndexError(
                f"there is no class {index}: the pool has 0 to {self.num_classes - 1}"
            )
        start = int(self.counts[:index].sum())
        return self.take(slice(start, start + int(self.counts[index])))

    def take(self, rows: Array | slice) -> Array:
        """Return the examples [n, ...] with these places in [0, N)."""
        stored: Any = self.stored
        if isinstance(stored, np.ndarray):  # in the host's memory
            chosen = rows if isinstance(rows, slice) else np.asarray(rows)
            x = jnp.asarray(stored[chosen])
        elif isinstance(rows, slice):
            x = stored[rows]
        else:
            x = stored.at[rows].get(mode="promise_in_bounds")
        if x.shape[1:] == self.shape:
            return x
        flat = x.reshape(len(x), math.prod(x.shape[1:]))
        return flat[:, : math.prod(self.shape)].reshape(len(x), *self.shape)

    def with_images(self, images: Array | np.ndarray) -> ClassPool:
        """Return a pool of other examples [N, ...] in the same classes and groups.

        Raises:
          ValueError: there are more or fewer of them, or `make_pool` refuses them.
        """
        if len(images) != len(self.stored):
            raise ValueError(
                f"images has {len(images)} examples: give one for each of the pool's "
                f"{len(self.stored)}"
            )
        other = pool_of(np.asarray(images), np.asarray(self.counts))
        return dataclasses.replace(self, stored=other.stored, shape=other.shape)


class Dataset(NamedTuple):
    """Three pools without a class in common, and what is known about them."""

    name: str
    train: ClassPool
    validation: ClassPool
    test: ClassPool
    class_names: dict[str, tuple[Any, ...]]  # by split, in the pool's order
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
    *,
    in_host_memory: bool = False,
) -> ClassPool:
    """Build a pool from C arrays [M_c, ...], or from one [C, M, ...].

    Bytes are pixels, uint8 [.., H, W, ch]: an episode divides them by 255. Floats and
    wider integers of any shape (embeddings, spectrograms, token ids) are kept as they
    are, in 32 bits unless JAX is told otherwise: an episode's x then holds the same
    numbers. Classes of unequal size are not padded.

    Args:
      images: of each class.
      counts: [C], for one array [C, M, ...]: examples of each class, of which the
        others are padding.
      groups: ids [C, M] in [0, M), see `ClassPool`.
      in_host_memory: keep the examples there, where they are too many for the device,
        or where they are, if they are memory-mapped; for
        `metalstm.make_prefetching_train_loop`.

    Raises:
      ValueError: if there is no class, an image is no number or a byte of another
        shape, an integer needs more than 32 bits, a count is outside [1, M] or given
        with a list of arrays, or all images of a class are of one group.
    """
    if isinstance(images, np.ndarray | jax.Array):
        images = np.asarray(images)
        num_classes, num_slots = (*images.shape, 0, 0)[:2]
        if counts is None:
            counts = np.full(num_classes, num_slots)
        counts = np.asarray(counts)
        bad = counts.shape != (num_classes,)
        if bad or (num_classes and not 1 <= counts.min() <= counts.max() <= num_slots):
            raise ValueError(
                f"counts must hold {num_classes} integers in [1, {num_slots}], got "
                f"{counts.tolist()[:10]}"
            )
        if (counts == num_slots).all():
            images = images.reshape(-1, *images.shape[2:])
        else:
            images = images[np.arange(num_slots) < counts[:, None]]
    elif counts is not None:
        raise ValueError(
            "counts= is for one array [C, M, ...]: omit it for a list of arrays"
        )
    else:
        images, counts = join_classes(images)
    if len(images) > 1 and all(np.array_equal(images[0], image) for image in images):
        warnings.warn(
            f"all {len(images)} examples are the same: look at where they come from",
            RuntimeWarning,
            stacklevel=2,
        )
    return pool_of(images, counts, groups, in_host_memory=in_host_memory)


def pool_of(
    images: np.ndarray,
    counts: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    in_host_memory: bool = False,
) -> ClassPool:
    """Build a pool from examples [N, ...], one class behind the other."""
    images, counts = np.asarray(images), np.asarray(counts)
    is_number = images.dtype.kind in "iuf" or jnp.issubdtype(images.dtype, jnp.floating)
    is_pixels = images.dtype != np.uint8 or images.ndim == 4
    if not (is_number and is_pixels and images.ndim >= 2) or not len(counts):
        raise ValueError(
            f"images must be uint8 of shape [C, M, H, W, ch], or floats or wider "
            f"integers [C, M, ...], with C >= 1, got {images.dtype} of {len(counts)} "
            f"classes, each example of shape {list(images.shape[1:])}"
        )
    if images.dtype.itemsize > 4 and images.dtype.kind in "iu":
        low, high = images.min(initial=0), images.max(initial=0)
        if low < -(2**31) or high >= 2**31:
            raise ValueError(
                f"images span {low} to {high}: give integers that 32 bits hold"
            )
        images = images.astype(np.int32)
    if counts.min() < 1:
        raise ValueError(f"class {counts.argmin()} has no example: omit it")
    if groups is not None:
        _check_groups(groups, counts, (len(counts), int(counts.max())))
    stored: Any = images if in_host_memory else jnp.asarray(in_tiles(images))
    return ClassPool(
        stored,
        jnp.asarray(counts, jnp.int32),
        None if groups is None else jnp.asarray(groups, jnp.int32),
        int(counts.min()),
        images.shape[1:],
    )


def in_tiles(images: np.ndarray) -> np.ndarray:
    """[N, ...] -> [N, 8 t, 128], if the padding takes at most a third more memory."""
    size = math.prod(images.shape[1:])
    tiles = -(-size // math.prod(_TILE))
    padded = tiles * math.prod(_TILE)
    if 3 * padded > 4 * size:
        return images
    stored = np.zeros((len(images), padded), images.dtype)
    stored[:, :size] = images.reshape(len(images), size)
    return stored.reshape(len(images), tiles * _TILE[0], _TILE[1])


def join_classes(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Put C arrays [M_c, ...] one behind the other: [N, ...] and counts int32 [C].

    Raises:
      ValueError: if there is no class, or dtypes or shapes differ.
    """
    if not len(images):
        raise ValueError("images is empty: a pool needs at least one class")
    for i, of_class in enumerate(images):
        if of_class.dtype != images[0].dtype:
            raise ValueError(
                f"images[{i}] are {of_class.dtype} and images[0] {images[0].dtype}: "
                "give all as uint8, or all as one type of floats"
            )
        if of_class.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"images[{i}] are of shape {list(of_class.shape[1:])} and images[0] of "
                f"{list(images[0].shape[1:])}: resize them to one"
            )
    counts = np.array([len(of_class) for of_class in images], np.int32)
    return np.concatenate(images), counts


def evenly_spaced(items: Sequence, limit: int | None) -> Sequence:
    """Return at most ``limit`` of the items, in order; None: all.

    >>> evenly_spaced("abcdefgh", 3)
    ['a', 'e', 'h']
    """
    if limit is None or len(items) <= limit:
        return items
    check_at_least("max_per_class", limit, 1, "or None")
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


def checksum_of_classes(*parts: tuple[np.ndarray, np.ndarray]) -> str:
    """Return the `checksum` of pairs of examples [N, ...] and counts [C].

    Classes of one size count as [C, M, ...].
    """
    arrays: list[np.ndarray] = []
    for images, counts in parts:
        if len(counts) and (counts == counts[0]).all():
            images = images.reshape(len(counts), -1, *images.shape[1:])
        arrays += [images, counts]
    return checksum(*arrays)


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
