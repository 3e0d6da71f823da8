"""Omniglot (Lake et al., 2015): 1,623 characters of 50 alphabets, 20 drawings each.

Two splits are in use and their numbers do not compare. ``alphabets``: the published
background and evaluation sets, so test characters come from alphabets never seen, and
validation alphabets are held out of the background ones. ``characters``: all
characters shuffled, as in MAML's code; easier, since every alphabet is in all splits.
TFDS's small1 and small2 lie inside its train and are never used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalstm.checks import check_choice
from metalstm.data.cache import (
    PathLike,
    Split,
    assemble,
    cache_folder,
    cached,
    fingerprint,
)
from metalstm.data.pools import SPLITS, Dataset
from metalstm.data.sources.tfds import open_builder

__all__ = ["CHARACTER_SPLIT", "VALIDATION_ALPHABETS", "load_omniglot"]


VALIDATION_ALPHABETS = (
    "Alphabet_of_the_Magi",
    "Armenian",
    "Burmese_(Myanmar)",
    "N_Ko",
    "Tifinagh",
)
"""Withheld from the 30 background alphabets: invented and in use, round and angular, 20
to 55 characters, and no near relative among the other 25."""

CHARACTER_SPLIT = {"train": 1100, "validation": 100, "test": 423}

_BACKGROUND, _EVALUATION = 964, 659  # characters
_DRAWINGS = 20
_VERSION = 1  # of what the cache holds


class _Drawings(NamedTuple):
    images: np.ndarray  # uint8 [C, 20, size, size, 1], strokes 255 on 0
    alphabets: np.ndarray  # str [C]
    names: np.ndarray  # str [C], alphabet/character
    background: np.ndarray  # bool [C]


def load_omniglot(
    data_dir: PathLike | None = None,
    *,
    split: str = "alphabets",
    image_size: int = 28,
    seed: int = 0,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load Omniglot from TFDS: strokes 255 on 0, ``image_size`` pixels square.

    Args:
      data_dir: TFDS's folder; default TFDS_DATA_DIR, then TFDS's default.
      split: "alphabets" (781 / 183 / 659 characters of 25 / 5 / 20 alphabets) or
        "characters" (1,100 / 100 / 423, shuffled).
      image_size: the 105 x 105 drawings are averaged down to this.
      seed: of the shuffled split.
      cache_dir: where the decoded images are kept; see `metalstm.data.cache`.

    Raises:
      ImportError, FileNotFoundError: see `metalstm.data.sources.tfds.open_builder`.
      ValueError: for another ``split`` or an ``image_size`` outside [1, 105].
    """
    check_choice("split", split, ("alphabets", "characters"))
    if not 1 <= image_size <= 105:
        raise ValueError(f"image_size={image_size}: choose a number from 1 to 105")
    builder = open_builder("omniglot", data_dir)
    key = fingerprint([_VERSION, builder.info.full_name, image_size])
    path = cache_folder(cache_dir) / f"omniglot-{image_size}-{key}.npz"
    arrays = cached(path, lambda: _decode(builder, image_size)._asdict())
    return _divide(_Drawings(**arrays), split, seed)


def _divide(drawings: _Drawings, split: str, seed: int) -> Dataset:
    info: dict[str, Any] = {"split": split}
    if split == "alphabets":
        withheld = np.isin(drawings.alphabets, VALIDATION_ALPHABETS)
        rows = {
            "train": np.flatnonzero(drawings.background & ~withheld),
            "validation": np.flatnonzero(drawings.background & withheld),
            "test": np.flatnonzero(~drawings.background),
        }
        info["validation_alphabets"] = list(VALIDATION_ALPHABETS)
    else:
        # The legacy generator, whose streams are frozen: a split must never move.
        order = np.random.RandomState(seed).permutation(len(drawings.names))
        bounds = np.cumsum([0, *CHARACTER_SPLIT.values()])
        rows = {
            name: np.sort(order[bounds[i] : bounds[i + 1]])
            for name, i in SPLITS.items()
        }
        info["seed"] = seed
    parts = {
        name: Split(
            drawings.images[index].reshape(-1, *drawings.images.shape[2:]),
            np.full(len(index), _DRAWINGS, np.int32),
            tuple(drawings.names[index].tolist()),
        )
        for name, index in rows.items()
    }
    return assemble("omniglot", parts, info)


def _decode(builder: Any, image_size: int) -> _Drawings:
    parts = [
        _read(builder, "train", _BACKGROUND, image_size),
        _read(builder, "test", _EVALUATION, image_size),
    ]
    return _Drawings(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _read(builder: Any, split: str, num_characters: int, size: int) -> _Drawings:
    alphabet_names = builder.info.features["alphabet"].names
    by_label: dict[int, list[np.ndarray]] = {}
    names: dict[int, tuple[str, str]] = {}
    for example in builder.as_data_source(split=split):
        label = int(example["label"])
        by_label.setdefault(label, []).append(example["image"][..., 0])
        alphabet = alphabet_names[int(example["alphabet"])]
        names[label] = alphabet, f"{alphabet}/{int(example['alphabet_char_id']):02d}"
    labels = sorted(by_label)
    counts = {len(images) for images in by_label.values()}
    if len(labels) != num_characters or counts != {_DRAWINGS}:
        raise ValueError(
            f"{split} of {builder.info.full_name} holds {len(labels)} characters of "
            f"{sorted(counts)} drawings, not {num_characters} of {_DRAWINGS}; prepare "
            f"it again"
        )
    drawings = np.stack([np.stack(by_label.pop(label)) for label in labels])
    alphabets, full = zip(*(names[label] for label in labels), strict=True)
    background = np.full(len(labels), split == "train")
    images = _shrink(drawings, size)
    return _Drawings(images, np.array(alphabets), np.array(full), background)


def _shrink(drawings: np.ndarray, size: int) -> np.ndarray:
    """Average strokes [C, 20, H, W], black on white, down to uint8, white on black.

    The files are 1-bit PNG. One decoder gives 0 and 1, another 0 and 255, so the
    largest value of all is what paper looks like.
    """
    paper = drawings.max()
    if paper not in (1, 255) or drawings.min() != 0:
        raise ValueError(
            f"drawings have values from {drawings.min()} to {paper}; strokes of 0 on "
            f"paper of 1 or 255 were expected"
        )
    if (drawings == 0).mean() > 0.5:
        raise ValueError("drawings are more than half ink: strokes should be 0")
    rows, columns = (_averaging(side, size) for side in drawings.shape[2:])
    out = np.empty((*drawings.shape[:2], size, size, 1), np.uint8)
    for target, character in zip(out, drawings, strict=True):
        ink = 1 - character.astype(np.float32) / paper
        target[..., 0] = np.rint(255 * (rows @ ink @ columns.T))
    return out


def _averaging(side: int, size: int) -> np.ndarray:
    """Return the [size, side] matrix that averages ``side`` pixels by area."""
    edges = np.linspace(0, side, size + 1)
    pixels = np.arange(side)
    low = np.maximum(edges[:-1, None], pixels)
    high = np.minimum(edges[1:, None], pixels + 1)
    return (np.maximum(0, high - low) * size / side).astype(np.float32)
