"""Folders of image files, one folder a class: a user's, or mini-ImageNet's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metalstm.data.cache import (
    PathLike,
    Split,
    cache_folder,
    cached_dataset,
    fingerprint,
)
from metalstm.data.images import decode_files
from metalstm.data.pools import SPLITS, Dataset
from metalstm.data.splits import check_disjoint, split_classes

__all__ = [
    "VERSION",
    "Files",
    "class_files",
    "decode_splits",
    "list_files",
    "load_image_folders",
    "split_folders",
]

Files = dict[str, list[Path]]
"""class -> its files"""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
VERSION = 1  # of the decoding below: what the caches hold
_NUM_NAMED = 10  # of the corrupt files


def load_image_folders(
    root: PathLike,
    *,
    image_size: int = 84,
    channels: int = 3,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
    seed: int = 0,
    min_images: int = 2,
    skip_corrupt: bool = False,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load a user's images: one folder a class.

    Where ``root`` holds train/, val/ and test/ (or valid/, validation/), the classes in
    them are the splits. Otherwise the folders in ``root`` are the classes, and they are
    divided at random, the same way for the same ``seed``.

    Args:
      image_size: the middle square of every image is resized to this.
      channels: 3 for colour, 1 for grey.
      fractions: of the classes for training, validation and test.
      seed: of the division.
      min_images: the fewest images a class may have.
      skip_corrupt: omit files that cannot be decoded, counted in
        ``info["skipped"]`` and the first named in ``info["skipped_files"]``, where the
        default is to name and count them and stop.
      cache_dir: where the decoded images are kept; see `metalstm.data.cache`.

    Raises:
      FileNotFoundError: if ``root`` is not a folder or holds no images.
      ValueError: for a class in two splits, a class with too few images, fewer than
        three classes, a corrupt file, or ``channels`` other than 1 or 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: choose 3 (colour) or 1 (grey)")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; give one with a folder per class")
    files, how = _divide_files(root, fractions, seed)
    _check_counts({n: len(f) for s in SPLITS for n, f in files[s].items()}, min_images)

    key = fingerprint(
        [
            VERSION,
            image_size,
            channels,
            skip_corrupt,
            *list_files(files, root, dates=True),
        ]
    )
    dataset = cached_dataset(
        root.resolve().name,
        cache_folder(cache_dir) / f"folders-{key}.npz",
        lambda: decode_splits(
            files,
            {"split": how},
            size=image_size,
            channels=channels,
            skip_corrupt=skip_corrupt,
        ),
    )
    counts = {
        name: int(count)
        for split in SPLITS
        for name, count in zip(
            dataset.class_names[split], dataset.pool(split).counts, strict=True
        )
    }
    _check_counts(counts, min_images)  # again: skipping may have left too few
    return dataset


def _divide_files(
    root: Path, fractions: tuple[float, float, float], seed: int
) -> tuple[dict[str, Files], str]:
    """Return per split its classes' files, and in words how they were divided."""
    found = split_folders(root)
    if found and set(found) != set(SPLITS):
        missing = sorted(set(SPLITS) - set(found))
        raise ValueError(
            f"{root} has folders for {', '.join(sorted(found))} but none for "
            f"{', '.join(missing)}; add it, or put all classes into one folder to "
            f"have them divided"
        )
    if found:
        files = {split: class_files(found[split]) for split in SPLITS}
        how = "folders"
    else:
        every = class_files(root)
        _check_some(every, root)
        division = split_classes(list(every), seed=seed, fractions=fractions)
        files = {s: {name: every[name] for name in division[s]} for s in SPLITS}
        how = f"by class, seed {seed}"
    for split in SPLITS:
        _check_some(files[split], found.get(split, root))
    check_disjoint({split: list(files[split]) for split in SPLITS})
    return files, how


def _check_some(files: Files, folder: Path) -> None:
    if not any(files.values()):
        raise FileNotFoundError(
            f"no images in {folder}: expected a folder per class with files ending in "
            f"{', '.join(_SUFFIXES)}"
        )


def _check_counts(counts: Mapping[str, int], min_images: int) -> None:
    for name, count in counts.items():
        if count < min_images:
            raise ValueError(
                f"class {name!r} has {count} images, at least {min_images} are needed; "
                f"add images or move the class out of the folder"
            )


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split that ``root`` has one for."""
    return {
        split: root / name
        for split, names in _FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }


def class_files(folder: Path) -> Files:
    """Return each class folder's image files, sorted; hidden folders are omitted."""
    return {
        entry.name: [
            entry / name
            for name in sorted(os.listdir(entry))
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }


def list_files(files: Mapping[str, Files], root: Path, *, dates: bool) -> Iterable[str]:
    """Yield a line for each file, to take a `fingerprint` of."""
    for split in SPLITS:
        for paths in files[split].values():
            for path in paths:
                size, date = _size_and_date(path)
                yield f"{split} {path.relative_to(root)} {size} {date if dates else ''}"


def _size_and_date(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere: decoding will name it
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def decode_splits(
    files: Mapping[str, Files],
    info: Mapping[str, Any],
    *,
    size: int,
    channels: int,
    skip_corrupt: bool = False,
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Decode the files of each split.

    Args:
      files: per split, per class its files.
      skip_corrupt: omit files that cannot be decoded, and count them in the info.

    Raises:
      ValueError: a corrupt file, or with ``skip_corrupt`` a class of nothing else.
    """
    splits: dict[str, Split] = {}
    corrupt: list[tuple[Path, Exception]] = []
    for split in SPLITS:
        most = max(len(paths) for paths in files[split].values())
        shape = (len(files[split]), most, size, size, channels)
        images, counts = np.zeros(shape, np.uint8), np.zeros(shape[0], np.int32)
        for row, paths in enumerate(files[split].values()):
            decoded = decode_files(paths, size=size, channels=channels)
            for path, image in zip(paths, decoded, strict=True):
                if not isinstance(image, Exception):
                    images[row, counts[row]] = image
                    counts[row] += 1
                else:
                    corrupt.append((path, image))
            if skip_corrupt and not counts[row]:
                name = paths[0].parent.name
                raise ValueError(f"class {name!r}: none of its files can be decoded")
        splits[split] = Split(images, counts, tuple(files[split]))
    if corrupt and not skip_corrupt:
        raise ValueError(_describe_corrupt(corrupt))
    kept: dict[str, Any] = {"skipped": len(corrupt)}
    if corrupt:
        kept["skipped_files"] = [str(path) for path, _ in corrupt[:_NUM_NAMED]]
    return splits, {**info, **kept}


def _describe_corrupt(corrupt: list[tuple[Path, Exception]]) -> str:
    path, error = corrupt[0]
    others = [str(path) for path, _ in corrupt[1:_NUM_NAMED]]
    message = f"{path} cannot be decoded ({error})"
    if others:
        message += f", and {len(corrupt) - 1} more: {', '.join(others)}"
        message += ", .." * (len(corrupt) > _NUM_NAMED)
    return (
        f"{message}; replace or remove what is corrupt, or omit it with "
        "skip_corrupt=True"
    )
