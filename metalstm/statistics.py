"""Intervals over episodes, instances and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "mean_and_ci95"]


class Estimate(NamedTuple):
    """A mean and half its 95% interval; a format is that of both.

    >>> f"{Estimate(0.25, 0.0625):+.2f}"
    '+0.25 ± 0.06'
    """

    mean: float
    ci95: float

    @property
    def percent(self) -> Estimate:
        return Estimate(100 * self.mean, 100 * self.ci95)

    def __format__(self, style: str) -> str:
        return f"{self.mean:{style}} ± {self.ci95:{style.removeprefix('+')}}"


def mean_and_ci95(values: np.ndarray) -> Estimate:
    """Return the mean and 1.96 standard errors (n - 1 in the variance).

    >>> mean, ci95 = mean_and_ci95(np.array([1.0, 3.0]))
    >>> mean, round(ci95, 3)
    (2.0, 1.96)

    Raises:
      ValueError: fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if values.size < 2:
        raise ValueError(
            f"values has {values.size} entries: a confidence interval needs 2 or more"
        )
    half = 1.96 * values.std(ddof=1) / np.sqrt(values.size)
    return Estimate(float(values.mean()), float(half))
