"""Arrays with labels, such as spectrograms of speakers: one .npz, divided by label."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from metalstm.data.cache import PathLike, Split, assemble
from metalstm.data.pools import (
    SPLITS,
    Dataset,
    evenly_spaced,
    images_per_class,
    pad_classes,
)
from metalstm.data.splits import split_classes

__all__ = ["load_arrays", "read_arrays"]


_UNREADABLE = (
    ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def read_arrays(path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read examples uint8 [N, H, W, ch] and their labels [N] from a .npz.

    The file holds ``x``, [N, H, W] or [N, H, W, ch], of bytes or of floats in [0, 1],
    which are kept in 256 levels, and ``y``, [N], of integers or strings.

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
    if x.ndim not in (3, 4) or not x.size:
        raise ValueError(
            f"x of {path} has the shape {list(x.shape)}: give [N, H, W] or "
            "[N, H, W, ch]"
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iuU":
        raise ValueError(
            f"y of {path} is {y.dtype} {list(y.shape)}: give an integer or a string "
            f"for each of the {len(x)} examples"
        )
    return _as_bytes(x if x.ndim == 4 else x[..., None], path), y


def _as_bytes(x: np.ndarray, path: Path) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    # in this form it refuses NaN too, of which no comparison is true
    if x.dtype.kind != "f" or not (x.min() >= 0 and x.max() <= 1):
        span = "" if x.dtype.kind != "f" else f" from {x.min():.3g} to {x.max():.3g}"
        raise ValueError(
            f"x of {path} is {x.dtype}{span}: give uint8, or floats in [0, 1], scaled "
            "the same way in every file that is used together"
        )
    return np.rint(x * np.float32(255)).astype(np.uint8)


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

    Args:
      path: see `read_arrays`.
      fractions: of the labels for training, validation and test.
      seed: of the division.
      min_examples: the fewest a label may have.
      max_per_class: keep only so many of a label, evenly spaced in the file, counted in
        ``info["omitted"]``. None: all, unless one label alone would take most of the
        memory; a warning then says how many are kept.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `read_arrays`; fewer than three labels, or one with too few
        examples.
    """
    x, y = read_arrays(path)
    labels, which, counts = np.unique(y, return_inverse=True, return_counts=True)
    few = counts < min_examples
    if few.any():
        raise ValueError(
            f"label {labels[few][0]} of {path} has {counts[few][0]} examples, at least "
            f"{min_examples} are needed: add some, or omit it"
        )
    rows = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
    of_label = dict(zip(map(str, labels), rows, strict=True))
    division = split_classes(list(of_label), seed=seed, fractions=fractions)
    splits, omitted, stem = {}, 0, Path(path).stem
    for split in SPLITS:
        found = {name: of_label[name] for name in division[split]}
        sizes = {name: len(chosen) for name, chosen in found.items()}
        limit = images_per_class(sizes, max_per_class, f"{stem}'s {split} split")
        kept = [evenly_spaced(list(chosen), limit) for chosen in found.values()]
        omitted += sum(sizes.values()) - sum(map(len, kept))
        padded, per_label = pad_classes([x[chosen] for chosen in kept])
        splits[split] = Split(padded, per_label, division[split])
    info: dict[str, Any] = {"split": f"by label, seed {seed}"}
    return assemble(stem, splits, info | ({"omitted": omitted} if omitted else {}))
