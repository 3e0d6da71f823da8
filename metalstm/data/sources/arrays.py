"""Arrays with labels, such as spectrograms of speakers, divided by label."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from metalstm.data.cache import PathLike, Split, assemble
from metalstm.data.pools import SPLITS, Dataset, evenly_spaced, join_classes
from metalstm.data.sources.folders import find_files
from metalstm.data.splits import split_classes

__all__ = ["load_arrays", "read_arrays"]


_UNREADABLE = (
    ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def read_arrays(path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read examples [N, ...] and their labels [N] from a .npz.

    The file holds ``x`` and ``y``. Where x is of bytes it holds images, [N, H, W] or
    [N, H, W, ch]. Floats and wider integers are of any shape [N, ...] (embeddings,
    spectrograms, time series, token ids) and are returned as they are. y is of integers
    or strings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no .npz, or holds something else; the message has a remedy.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .npz with arrays x and y")
    try:
        # an unpickled object could run any code
        with np.load(path, allow_pickle=False) as stored:
            x, y = stored["x"], stored["y"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} holds no arrays x and y: write it with np.savez(path, x=.., y=..)"
        ) from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read ({error}): write it with np.savez(path, x=.., y=..)"
        ) from error
    x = _checked(x, f"x of {path}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iuU":
        raise ValueError(
            f"y of {path} is {y.dtype} {list(y.shape)}: give an integer or a string "
            f"for each of the {len(x)} examples"
        )
    return x, y


def _checked(x: np.ndarray, where: str) -> np.ndarray:
    """Return examples [N, ...] as they are, grey images with their channel."""
    ranks = (3, 4) if x.dtype == np.uint8 else range(2, 32)
    if x.ndim not in ranks or not x.size:
        raise ValueError(
            f"{where} has the shape {list(x.shape)}: give images [N, H, W] or "
            "[N, H, W, ch] of bytes, or floats or wider integers [N, ...]"
        )
    if x.dtype.kind not in "iuf":
        raise ValueError(f"{where} is {x.dtype}: give bytes, floats or integers")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise ValueError(
            f"{where} has {int((~np.isfinite(x)).sum())} numbers that are not finite: "
            "replace them, or omit these examples"
        )
    return x[..., None] if x.dtype == np.uint8 and x.ndim == 3 else x


def load_arrays(
    path: PathLike,
    *,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
    seed: int = 0,
    min_examples: int = 2,
    max_per_class: int | None = None,
) -> Dataset:
    """Load labelled arrays, the labels divided into training, validation and test.

    No label is in two splits. The same labels and ``seed`` give the same division.
    Bytes are images; all else comes as it is, see `read_arrays`. ``class_names`` holds
    the labels, of the type that they have in the file.

    Args:
      path: a .npz, see `read_arrays`; or a folder like those of `load_image_folders`,
        in which each file is one example, a .npy.
      fractions: of the labels for training, validation and test.
      seed: of the division.
      min_examples: the fewest a label may have.
      max_per_class: keep only so many of a label, evenly spaced in the file; ``info``
        counts the others, as ``"over_limit"``. None: all.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `read_arrays`; fewer than three labels, or one with too few
        examples.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_folders(
            path,
            fractions=fractions,
            seed=seed,
            min_files=min_examples,
            max_per_class=max_per_class,
        )
    x, y = read_arrays(path)
    labels, which, counts = np.unique(y, return_inverse=True, return_counts=True)
    few = counts < min_examples
    if few.any():
        raise ValueError(
            f"label {labels[few][0]} of {path} has {counts[few][0]} examples, at least "
            f"{min_examples} are needed: add some, or omit it"
        )
    rows = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    of_label = {
        str(label): (label, evenly_spaced(list(chosen), max_per_class))
        for label, chosen in zip(labels.tolist(), rows, strict=True)
    }
    division = split_classes(list(of_label), seed=seed, fractions=fractions)
    splits, num_kept = {}, 0
    for split in SPLITS:
        names, chosen = zip(*(of_label[name] for name in division[split]), strict=True)
        joined = np.concatenate(chosen)
        sizes = np.array([len(part) for part in chosen], np.int32)
        splits[split] = Split(x[joined], sizes, names)
        num_kept += len(joined)
    info: dict[str, Any] = {"split": f"by label, seed {seed}"}
    if num_kept < len(x):
        info["over_limit"] = len(x) - num_kept
    return assemble(path.stem, splits, info)


def _load_folders(root: Path, **options: Any) -> Dataset:
    files, how, left_out = find_files(root, suffixes=(".npy",), **options)
    splits = {}
    for split in SPLITS:
        classes = [_stack(paths) for paths in files[split].values()]
        splits[split] = Split(*join_classes(classes), tuple(files[split]))
    return assemble(root.resolve().name, splits, {"split": how} | left_out)


def _stack(paths: list[Path]) -> np.ndarray:
    """Return the examples of a class, [M_c, ...]."""
    examples = []
    for path in paths:
        try:
            examples.append(np.load(path, allow_pickle=False))
        except _UNREADABLE as error:
            raise ValueError(
                f"{path} cannot be read ({error}): write it with np.save"
            ) from error
        first, example = examples[0], examples[-1]
        if (example.shape, example.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{path} is {example.dtype} {list(example.shape)} and {paths[0]} "
                f"{first.dtype} {list(first.shape)}: give all one shape and type"
            )
    return _checked(np.stack(examples), f"what {paths[0].parent} holds")
