"""Folders of image files, one folder a class: a user's, or mini-ImageNet's."""

from __future__ import annotations

import os
import warnings
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
from metalstm.data.pools import SPLITS, Dataset, evenly_spaced
from metalstm.data.splits import check_disjoint, split_classes

__all__ = [
    "VERSION",
    "Files",
    "class_files",
    "decode_splits",
    "find_files",
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
    background: str = "white",
    max_per_class: int | None = None,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load a user's images: one folder a class.

    Where ``root`` holds train/, val/ and test/ (or valid/, validation/, in any case),
    the classes in them are the splits. Otherwise the folders in ``root`` are the
    classes, and they are divided at random, the same way for the same ``seed``.

    Read are the image files that lie in a class's folder itself. What else lies under
    ``root`` is counted in ``info["omitted"]`` and named in a warning, hidden files
    aside. Images are turned upright by their EXIF orientation. Refused as corrupt are
    images of more than 8 bits a channel in grey, and of several frames or pages.

    Args:
      image_size: the middle square of every image is resized to this.
      channels: 3 for colour, 1 for grey.
      fractions: of the classes for training, validation and test.
      seed: of the division.
      min_images: the fewest images a class may have.
      skip_corrupt: omit files that cannot be decoded, counted in
        ``info["skipped"]`` and the first named in ``info["skipped_files"]``, where the
        default is to name and count them and stop.
      background: the colour behind transparent images, as Pillow names it.
      max_per_class: keep only so many images of a class, evenly spaced by name;
        ``info["over_limit"]`` counts the others. None: all.
      cache_dir: where the decoded images are kept; see `metalstm.data.cache`.

    Raises:
      FileNotFoundError: if ``root`` is not a folder or holds no images.
      ValueError: for a class in two splits, a class with too few images, fewer than
        three classes, a corrupt file, one that stands under two names (by a link), a
        split with two folders, ``channels`` other than 1 or 3, or no colour.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: choose 3 (colour) or 1 (grey)")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; give one with a folder per class")
    files, how, left_out = find_files(
        root,
        fractions=fractions,
        seed=seed,
        min_files=min_images,
        max_per_class=max_per_class,
    )
    key = fingerprint(
        [
            VERSION,
            image_size,
            channels,
            skip_corrupt,
            background,
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
            background=background,
        ),
    )
    dataset = dataset._replace(info=dataset.info | left_out)
    counts = {
        name: int(count)
        for split in SPLITS
        for name, count in zip(
            dataset.class_names[split], dataset.pool(split).counts, strict=True
        )
    }
    _check_counts(counts, min_images, "images")  # again: skipping may have left too few
    return dataset


def find_files(
    root: Path,
    *,
    fractions: tuple[float, float, float],
    seed: int,
    min_files: int,
    max_per_class: int | None,
    suffixes: tuple[str, ...] = _SUFFIXES,
) -> tuple[dict[str, Files], str, dict[str, Any]]:
    """Find the files of each split's classes, and what is left out.

    Returns:
      per split its classes' files; how they were divided, in words; what the info says
      of files that are not read, which a warning names, and of those over the limit.

    Raises:
      FileNotFoundError, ValueError: see `load_image_folders`.
    """
    found, how = _divide_files(root, fractions, seed, suffixes)
    counts = {n: len(f) for s in SPLITS for n, f in found[s].items()}
    _check_counts(counts, min_files, "images" if suffixes == _SUFFIXES else "files")
    _check_links(found)
    left_out = _count_omitted(root, found, suffixes)
    files = {
        split: {name: list(evenly_spaced(f, max_per_class)) for name, f in part.items()}
        for split, part in found.items()
    }
    if over := _num_files(found) - _num_files(files):
        left_out["over_limit"] = over
    return files, how, left_out


def _divide_files(
    root: Path,
    fractions: tuple[float, float, float],
    seed: int,
    suffixes: tuple[str, ...],
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
        files = {split: class_files(found[split], suffixes) for split in SPLITS}
        how = "folders"
    else:
        every = class_files(root, suffixes)
        _check_some(every, root, suffixes)
        division = split_classes(list(every), seed=seed, fractions=fractions)
        files = {s: {name: every[name] for name in division[s]} for s in SPLITS}
        how = f"by class, seed {seed}"
    for split in SPLITS:
        _check_some(files[split], found.get(split, root), suffixes)
    check_disjoint({split: list(files[split]) for split in SPLITS})
    return files, how


def _check_some(files: Files, folder: Path, suffixes: tuple[str, ...]) -> None:
    if not any(files.values()):
        what = "images" if suffixes == _SUFFIXES else "files"
        raise FileNotFoundError(
            f"no {what} in {folder}: expected a folder per class with files ending in "
            f"{', '.join(suffixes)}"
        )


def _check_counts(counts: Mapping[str, int], fewest: int, what: str) -> None:
    for name, count in counts.items():
        if count < fewest:
            raise ValueError(
                f"class {name!r} has {count} {what}, at least {fewest} are needed; "
                f"add {what} or move the class out of the folder"
            )


def _num_files(files: Mapping[str, Files]) -> int:
    return sum(len(paths) for split in files.values() for paths in split.values())


def _check_links(files: Mapping[str, Files]) -> None:
    """Refuse one file under two names: it could be support and query, or two classes"""
    seen: dict[tuple[int, int], Path] = {}
    for split in files.values():
        for path in (path for paths in split.values() for path in paths):
            try:
                stat = path.stat()
            except OSError:  # a link to nowhere: decoding will name it
                continue
            if not stat.st_ino:  # a file system without such numbers
                continue
            first = seen.setdefault((stat.st_dev, stat.st_ino), path)
            if first != path:
                raise ValueError(
                    f"{path} and {first} are one file by a link: remove one of them"
                )


def _count_omitted(
    root: Path, files: Mapping[str, Files], suffixes: tuple[str, ...]
) -> dict[str, Any]:
    """Count the files under ``root`` that are not read, and warn of visible ones."""
    classes = [paths for split in files.values() for paths in split.values()]
    read = {os.fspath(path) for paths in classes for path in paths}
    linked = {path.parent for paths in classes for path in paths[:1]}
    walks = [root, *sorted(folder for folder in linked if folder.is_symlink())]
    omitted = [
        os.path.join(folder, name)
        for top in walks
        for folder, _, names in os.walk(top)
        for name in sorted(names)
    ]
    omitted = [path for path in omitted if path not in read]
    if not omitted:
        return {}
    relative = [os.path.relpath(path, root) for path in omitted]
    visible = [p for p in relative if not any(n[0] == "." for n in p.split(os.sep))]
    if visible:
        few = ", ".join(map(_printable, visible[:_NUM_NAMED]))
        few += ", .." * (len(visible) > _NUM_NAMED)
        warnings.warn(
            f"{len(visible)} files in {root} are not read: {few}. Read are "
            f"files in a class's folder that end in {', '.join(suffixes)}",
            RuntimeWarning,
            stacklevel=4,
        )
    return {
        "omitted": len(omitted),
        "omitted_files": list(map(_printable, relative[:_NUM_NAMED])),
    }


def _printable(name: str) -> str:
    r"""Write bytes that are not UTF-8 as \xe9, so that any name can be printed."""
    return os.fsencode(name).decode(errors="backslashreplace")


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split that ``root`` has one for, in any case.

    Raises:
      ValueError: there are two for one split.
    """
    found: dict[str, Path] = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        for split, names in _FOLDERS.items():
            if entry.name.lower() in names and entry.is_dir():
                if split in found:
                    raise ValueError(
                        f"{root} has {found[split].name}/ and {entry.name}/ for "
                        f"{split}: keep one of them"
                    )
                found[split] = entry
    return found


def class_files(folder: Path, suffixes: tuple[str, ...] = _SUFFIXES) -> Files:
    """Return each class folder's files, sorted; hidden folders are omitted.

    Raises:
      ValueError: two folders have one name when printed.
    """
    found: Files = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        name = _printable(entry.name)
        if name in found:
            raise ValueError(f"{folder} has two classes {name!r}: rename one of them")
        found[name] = [
            entry / file
            for file in sorted(os.listdir(entry))
            if file.lower().endswith(suffixes) and not file.startswith(".")
        ]
    return found


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
    background: str = "white",
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
        num = sum(len(paths) for paths in files[split].values())
        images = np.zeros((num, size, size, channels), np.uint8)
        counts: list[int] = []
        for paths in files[split].values():
            decoded = decode_files(
                paths, size=size, channels=channels, background=background
            )
            start = sum(counts)
            good = [image for image in decoded if not isinstance(image, Exception)]
            for path, image in zip(paths, decoded, strict=True):
                if isinstance(image, Exception):
                    corrupt.append((path, image))
            images[start : start + len(good)] = good or images[:0]
            counts.append(len(good))
            if skip_corrupt and not good:
                name = paths[0].parent.name
                raise ValueError(f"class {name!r}: none of its files can be decoded")
        kept = images[: sum(counts)]
        splits[split] = Split(kept, np.array(counts, np.int32), tuple(files[split]))
    if corrupt and not skip_corrupt:
        raise ValueError(_describe_corrupt(corrupt))
    left_out: dict[str, Any] = {"skipped": len(corrupt)}
    if corrupt:
        left_out["skipped_files"] = [
            _printable(str(p)) for p, _ in corrupt[:_NUM_NAMED]
        ]
    return splits, {**info, **left_out}


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
