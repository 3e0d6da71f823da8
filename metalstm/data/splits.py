"""Divide a data set's classes into training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from metalstm.data.pools import SPLITS

__all__ = ["check_disjoint", "split_classes"]


def split_classes(
    names: Sequence[str],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
) -> dict[str, tuple[str, ...]]:
    """Shuffle the classes and divide them; the same for the same names and seed.

    The default fractions are mini-ImageNet's (64, 16 and 20 of 100). Every split gets
    at least one class.

    Raises:
      ValueError: for fewer than three classes, or fractions that are not all positive.
    """
    if len(names) < 3:
        raise ValueError(
            f"{len(names)} classes cannot be divided into train, validation and test; "
            f"at least 3 are needed"
        )
    if min(fractions) <= 0:
        raise ValueError(f"fractions={fractions}: all three must be above 0")
    # The legacy generator, whose streams are frozen: a split must never move.
    order = np.random.RandomState(seed).permutation(len(names))
    shuffled = [sorted(names)[i] for i in order]
    total = sum(fractions)
    num_validation = max(1, round(len(names) * fractions[1] / total))
    num_test = max(1, round(len(names) * fractions[2] / total))
    num_train = len(names) - num_validation - num_test
    if num_train < 1:
        num_validation, num_test, num_train = 1, 1, len(names) - 2
    bounds = (0, num_train, num_train + num_validation, len(names))
    return {
        split: tuple(sorted(shuffled[bounds[i] : bounds[i + 1]]))
        for split, i in SPLITS.items()
    }


def check_disjoint(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuse a class that is in two splits, or a split that is missing or empty."""
    if set(splits) != set(SPLITS) or not all(splits.values()):
        raise ValueError(
            f"splits {sorted(splits)}: give classes for each of {', '.join(SPLITS)}"
        )
    split_of: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if name in split_of:
                raise ValueError(
                    f"class {name!r} is in {split_of[name]} and in {split}; an episode "
                    f"of {split} must not show what was trained on: keep it in one"
                )
            split_of[name] = split
