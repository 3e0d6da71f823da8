"""Features of a frozen backbone: images to vectors once, then only vectors.

Shapes: N images, D features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from metalstm.checks import check_at_least
from metalstm.data.cache import PathLike, cache_folder, cached, fingerprint
from metalstm.data.pools import (
    SPLITS,
    ClassPool,
    Dataset,
    checksum,
    checksum_of_classes,
)

__all__ = ["embed"]

Data = TypeVar("Data", np.ndarray, ClassPool, Dataset)

_FORMAT = 1  # of the cache's files
_SAME = 0.02  # relative difference that is rounding, in bfloat16 too


def embed(
    fn: Callable[[np.ndarray], Any],
    data: Data,
    *,
    name: str | None = None,
    batch_size: int = 64,
    cache_dir: PathLike | None = None,
    progress: bool = True,
) -> Data:
    """Replace each image by its vector ``fn(image)``, once.

    The result holds float32 vectors, [N, D] in place of [N, H, W, ch], with the
    classes' names, counts and groups. Samplers and algorithms take it as they take
    images; the vectors are neither scaled nor quantised.

    ``fn`` may be a jitted function, a flax model, or one of another library: it takes a
    numpy array. It is called with ``batch_size`` images each time, so that it compiles
    once; the last batch is filled up by repeating an image.

    With a ``name`` the features are cached, under the images' checksum and the name.
    Nothing can tell from the outside that ``fn`` has changed and its name has not, so
    ``fn`` is called once more for three images, and cached features that differ are
    refused.

    Args:
      fn: images [N, H, W, ch], float32 in [0, 1] as an episode has them (what is no
        byte comes as it is), to vectors [N, D]. An image's vector must not depend on
        the others.
      data: a `Dataset`, a `ClassPool`, or an array [N, H, W, ch], such as new images to
        classify.
      name: of ``fn``, with whatever it depends on, such as
        ``"dinov2-small, 224, cls"``. None: nothing is cached.
      batch_size: images of one call.
      cache_dir: None: `cache_folder`.
      progress: show a bar, where tqdm is installed and there is a terminal.

    Raises:
      ValueError: ``fn`` returns another shape than [N, D], or numbers that are not
        finite; an image's vector changes with its batch or from call to call; cached
        features are another function's.
    """
    check_at_least("batch_size", batch_size, 1)
    options: dict[str, Any] = {
        "name": name,
        "batch_size": batch_size,
        "cache_dir": cache_dir,
        "progress": progress,
    }
    if isinstance(data, Dataset):
        pools = [embed(fn, data.pool(split), **options) for split in SPLITS]
        parts = [(np.asarray(pool.images), np.asarray(pool.counts)) for pool in pools]
        train, validation, test = pools
        return data._replace(
            train=train,
            validation=validation,
            test=test,
            image_shape=train.shape,
            checksum=checksum_of_classes(*parts),
            info=data.info | {"backbone": name, "images_checksum": data.checksum},
        )
    if isinstance(data, ClassPool):
        vectors = _embed_array(fn, np.asarray(data.images), **options)
        return data.with_images(vectors)
    return _embed_array(fn, np.asarray(data), **options)


def _embed_array(
    fn: Callable[[np.ndarray], Any],
    images: np.ndarray,
    *,
    name: str | None,
    batch_size: int,
    cache_dir: PathLike | None,
    progress: bool,
) -> np.ndarray:
    if images.ndim < 2 or not len(images):
        raise ValueError(
            f"data has shape {list(images.shape)}: give a Dataset, a ClassPool or "
            "images [N, H, W, ch]"
        )

    def compute(rows: np.ndarray) -> np.ndarray:
        batch = images[rows]
        if batch.dtype == np.uint8:
            batch = batch.astype(np.float32) / np.float32(255)
        return _checked(fn(batch), len(rows))

    def check(features: np.ndarray, remedy: str) -> None:
        # copies of three images: a vector that reads its batch shows here too
        rows = np.array([0, len(images) // 2, len(images) - 1])
        again = compute(np.resize(rows, batch_size))
        difference = _relative_difference(again, features[np.resize(rows, batch_size)])
        if difference > _SAME:
            raise ValueError(
                f"fn gives an image another vector than before (relative difference "
                f"{difference:.2g}): {remedy}"
            )

    def build() -> dict[str, np.ndarray]:
        parts = [
            compute(np.minimum(np.arange(k, k + batch_size), len(images) - 1))
            for k in _bar(range(0, len(images), batch_size), progress)
        ]
        features = np.concatenate(parts)[: len(images)]
        check(features, "switch its dropout off, and its batch norm to stored averages")
        return {"features": features}

    if name is None:
        return build()["features"]
    digest = fingerprint([_FORMAT, checksum(images), name])
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:40]
    path = cache_folder(cache_dir) / f"features-{readable}-{digest}.npz"
    was_there = path.exists()
    features = cached(path, build)["features"]
    if was_there:
        check(
            features,
            f"the features of name={name!r} in {path} are another function's; choose "
            "another name, or delete that file",
        )
    return features


def _relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return np.inf
    scale = np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
    return float((np.linalg.norm(a - b, axis=-1) / scale).max())


def _checked(vectors: Any, num: int) -> np.ndarray:
    array = np.asarray(vectors)
    if array.ndim != 2 or len(array) != num:
        raise ValueError(
            f"fn returned shape {list(array.shape)} for {num} images: return vectors "
            f"[{num}, D]; of maps or tokens take the mean over positions, or one token"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(
            f"fn returned {int((~np.isfinite(array)).sum())} numbers that are not "
            "finite: compute in float32, and check how images are normalised"
        )
    return array


def _bar(batches: Iterable[int], progress: bool) -> Iterable[int]:
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    # disable=None: only on a terminal
    return tqdm(batches, desc="embed", unit="batch", disable=None)
