"""Decoded data sets on disk: written completely or not at all, checked when read.

One uncompressed .npz a data set. The checksums of the zip catch truncation and flipped
bits, and a file appears under its name only once it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalstm.data.pools import (
    SPLITS,
    Dataset,
    checksum_of_classes,
    pool_of,
)
from metalstm.runtime.files import atomic_write

__all__ = [
    "PathLike",
    "Split",
    "assemble",
    "cache_folder",
    "cached",
    "cached_dataset",
    "fingerprint",
]

PathLike = str | os.PathLike[str]

_FORMAT = 2  # of what `cached_dataset` writes


class Split(NamedTuple):
    """One split as numpy arrays, before it goes to the device."""

    images: np.ndarray  # [N, ...], one class behind the other
    counts: np.ndarray  # int32 [C]
    names: tuple[Any, ...]  # C class names
    groups: np.ndarray | None = None  # int32 [C, M]


def cache_folder(explicit: PathLike | None = None) -> Path:
    """Return the folder of the caches; the first writer creates it.

    In order: the argument, METALSTM_CACHE_DIR, XDG_CACHE_HOME/metalstm, the platform's
    user cache folder (~/.cache/metalstm on Linux).
    """
    if explicit is not None:
        return Path(explicit).expanduser()
    if named := os.environ.get("METALSTM_CACHE_DIR"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "metalstm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "metalstm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "metalstm" / "Cache"
    return Path.home() / ".cache" / "metalstm"


def fingerprint(parts: Iterable[Any]) -> str:
    """Return 12 hex digits that change with any of ``parts`` (by their text)."""
    digest = hashlib.sha256()
    for part in parts:
        # file names may hold bytes that are not UTF-8
        digest.update(str(part).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:12]


def cached(
    path: Path,
    build: Callable[[], Mapping[str, np.ndarray]],
    *,
    remedy: str = "set METALSTM_CACHE_DIR to a folder that can be written",
) -> dict[str, np.ndarray]:
    """Return the arrays stored at ``path``; build and store them if there are none.

    A file that cannot be read completely is rebuilt, with a warning. Where the folder
    cannot be written, the arrays are returned and a warning repeats ``remedy``.
    """
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:  # by where the damage is, of a dozen kinds
            warnings.warn(
                f"cache {path} is damaged ({type(error).__name__}: {error}); "
                f"building it again",
                RuntimeWarning,
                stacklevel=2,
            )
    arrays = dict(build())
    try:
        _write(path, arrays)
    except OSError as error:
        warnings.warn(
            f"cannot write cache {path} ({error.__cause__ or error}): the next run "
            f"builds it again; {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )
    return arrays


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        np.savez(part, allow_pickle=False, **arrays)


def assemble(
    name: str,
    splits: Mapping[str, Split],
    info: Mapping[str, Any],
    digest: str | None = None,
) -> Dataset:
    """Move the three splits to the device as a `Dataset`.

    Warns of a split whose images are all the same one.
    """
    for split in SPLITS:
        if _all_alike(splits[split]):
            warnings.warn(
                f"all images of {name}'s {split} split are the same: look at the files",
                RuntimeWarning,
                stacklevel=3,
            )
    if digest is None:
        digest = checksum_of_classes(*(splits[split][:2] for split in SPLITS))
    pools = {
        split: pool_of(splits[split].images, splits[split].counts, splits[split].groups)
        for split in SPLITS
    }
    return Dataset(
        name=name,
        class_names={split: tuple(splits[split].names) for split in SPLITS},
        image_shape=tuple(splits["train"].images.shape[1:]),
        checksum=digest,
        info=dict(info),
        **pools,
    )


def _all_alike(split: Split) -> bool:
    """Whether there are several images and no two differ; stops at the first two."""
    first = split.images[0]
    return len(split.images) > 1 and all(np.array_equal(first, i) for i in split.images)


def cached_dataset(
    name: str,
    path: Path,
    build: Callable[[], tuple[Mapping[str, Split], Mapping[str, Any]]],
) -> Dataset:
    """Do what `cached` does for a `Dataset`; ``build`` returns splits and info."""
    path = path.with_name(f"{path.stem}-format{_FORMAT}{path.suffix}")

    def to_arrays() -> dict[str, np.ndarray]:
        splits, info = build()
        arrays: dict[str, np.ndarray] = {}
        names = {}
        for split in SPLITS:
            part = splits[split]
            arrays[f"{split}.images"], arrays[f"{split}.counts"] = part[:2]
            names[split] = part.names
            if part.groups is not None:
                arrays[f"{split}.groups"] = part.groups
        digest = checksum_of_classes(*(splits[split][:2] for split in SPLITS))
        meta = {"names": names, "info": dict(info), "checksum": digest}
        return {"meta": np.array(json.dumps(meta)), **arrays}

    arrays = cached(path, to_arrays)
    meta = json.loads(arrays["meta"].item())
    splits = {
        split: Split(
            # Popped, so that no more than one split is in memory twice.
            arrays.pop(f"{split}.images"),
            arrays.pop(f"{split}.counts"),
            tuple(meta["names"][split]),
            arrays.pop(f"{split}.groups", None),
        )
        for split in SPLITS
    }
    return assemble(name, splits, meta["info"], meta["checksum"])
