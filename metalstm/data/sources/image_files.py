"""Image files in folders, one folder a class: finding, listing and decoding them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metalstm.data.cache import Split
from metalstm.data.images import decode_files
from metalstm.data.pools import SPLITS

__all__ = [
    "SUFFIXES",
    "VERSION",
    "Files",
    "class_files",
    "decode_splits",
    "list_files",
    "split_folders",
]

Files = dict[str, list[Path]]
"""class -> its files"""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
VERSION = 1  # of the decoding below: what the caches hold
_NUM_NAMED = 10  # of the corrupt files


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
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
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
