"""Folders of image files, one folder a class: mini-ImageNet, or a user's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metalstm.data.cache import Split, cache_folder, cached_dataset, fingerprint
from metalstm.data.images import decode_files
from metalstm.data.pools import SPLITS, Dataset
from metalstm.data.sources import mini_imagenet
from metalstm.data.splits import check_disjoint, split_classes

__all__ = ["load_image_folders", "load_mini_imagenet"]

PathLike = str | os.PathLike[str]
Files = dict[str, list[Path]]  # class -> its files

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
_VERSION = 1  # of the decoding below: what the cache holds
_NAMED = 10  # of the corrupt files


def load_mini_imagenet(
    data_dir: PathLike | None,
    *,
    image_size: int = 84,
    images_per_class: int = mini_imagenet.IMAGES_PER_CLASS,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load mini-ImageNet in the published split, 64 / 16 / 20 classes of 600 images.

    Args:
      data_dir: holds train/, val/ and test/ of <wnid>/*.jpg.
      image_size: 84 as published; images of another size are resized.
      images_per_class: a class with another number of images is refused.
      cache_dir: where the decoded images are kept (1.3 GB), see `metalstm.data.cache`.

    Raises:
      FileNotFoundError: if there is nothing of the kind at ``data_dir``.
      ValueError: if the classes of a split are not the published ones, a class has
        another number of images, or an image is corrupt.
    """
    root = None if data_dir is None else Path(data_dir).expanduser()
    found = {} if root is None else _split_folders(root)
    if root is None or set(found) != set(SPLITS):
        raise FileNotFoundError(
            f"no mini-ImageNet at {root}. Expected folders train/, val/, test/ of "
            f"<wnid>/*.jpg in the split of Ravi & Larochelle; docs/data.md says where "
            f"people get it and what to check"
        )
    files = {split: _class_files(found[split]) for split in SPLITS}
    for split, expected in mini_imagenet.CLASSES.items():
        _check_published(split, files[split], expected, images_per_class, root)
    # The published files never change, so their dates do not matter.
    key = fingerprint([_VERSION, image_size, *_listing(files, root, dates=False)])
    return cached_dataset(
        "mini-imagenet",
        cache_folder(cache_dir) / f"mini-imagenet-{image_size}-{key}.npz",
        lambda: _decode(files, image_size, 3, False, {"split": "ravi-larochelle"}),
    )


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
    """Load a user's own images: one folder a class.

    Where ``root`` holds train/, val/ and test/ (or valid/, validation/), the classes in
    them are the splits. Otherwise ``root``'s own folders are the classes, and they are
    divided by class, at random but always alike for the same ``seed``.

    Args:
      image_size: the middle square of every image is resized to this.
      channels: 3 for colour, 1 for grey.
      fractions: of the classes for training, validation and test.
      seed: of the division.
      min_images: the fewest images a class may have.
      skip_corrupt: leave out files that cannot be decoded, counted in
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
    found = _split_folders(root)
    if found and set(found) != set(SPLITS):
        missing = sorted(set(SPLITS) - set(found))
        raise ValueError(
            f"{root} has folders for {', '.join(sorted(found))} but none for "
            f"{', '.join(missing)}; add it, or put all classes into one folder to "
            f"have them divided"
        )
    if found:
        files = {split: _class_files(found[split]) for split in SPLITS}
        how = "folders"
    else:
        every = _class_files(root)
        _check_some(every, root)
        division = split_classes(list(every), seed=seed, fractions=fractions)
        files = {s: {name: every[name] for name in division[s]} for s in SPLITS}
        how = f"by class, seed {seed}"
    for split in SPLITS:
        _check_some(files[split], found.get(split, root))
    check_disjoint({split: list(files[split]) for split in SPLITS})
    _check_counts({n: len(f) for s in SPLITS for n, f in files[s].items()}, min_images)

    key = fingerprint(
        [
            _VERSION,
            image_size,
            channels,
            skip_corrupt,
            *_listing(files, root, dates=True),
        ]
    )
    dataset = cached_dataset(
        root.resolve().name,
        cache_folder(cache_dir) / f"folders-{key}.npz",
        lambda: _decode(files, image_size, channels, skip_corrupt, {"split": how}),
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


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split that ``root`` has one for."""
    return {
        split: root / name
        for split, names in _FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }


def _class_files(folder: Path) -> Files:
    """Return each class folder's image files, sorted; hidden folders are left out."""
    return {
        entry.name: [
            entry / name
            for name in sorted(os.listdir(entry))
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }


def _listing(files: Mapping[str, Files], root: Path, *, dates: bool) -> Iterable[str]:
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


def _check_published(
    split: str, files: Files, expected: tuple[str, ...], num_images: int, root: Path
) -> None:
    missing = sorted(set(expected) - set(files))
    surplus = sorted(set(files) - set(expected))
    if missing or surplus:
        raise ValueError(
            f"the {split} classes at {root} are not those of Ravi & Larochelle: "
            f"{len(missing)} missing ({', '.join(missing[:5])}), {len(surplus)} not "
            f"expected ({', '.join(surplus[:5])}). For another split use "
            f"load_image_folders, and do not compare with published numbers"
        )
    for name, paths in files.items():
        if len(paths) != num_images:
            raise ValueError(
                f"class {name} at {root} has {len(paths)} images, not {num_images}; "
                f"unpack it again"
            )


def _decode(
    files: Mapping[str, Files],
    size: int,
    channels: int,
    skip_corrupt: bool,
    info: Mapping[str, Any],
) -> tuple[dict[str, Split], dict[str, Any]]:
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
        raise ValueError(_about_corrupt(corrupt))
    kept: dict[str, Any] = {"skipped": len(corrupt)}
    if corrupt:
        kept["skipped_files"] = [str(path) for path, _ in corrupt[:_NAMED]]
    return splits, {**info, **kept}


def _about_corrupt(corrupt: list[tuple[Path, Exception]]) -> str:
    path, error = corrupt[0]
    others = [str(path) for path, _ in corrupt[1:_NAMED]]
    said = f"{path} cannot be decoded ({error})"
    if others:
        said += f", nor can {len(corrupt) - 1} more: {', '.join(others)}"
        said += ", .." * (len(corrupt) > _NAMED)
    return (
        f"{said}; replace or remove what is corrupt, or leave it out with "
        "skip_corrupt=True"
    )
