"""Intervals over episodes, instances and seeds."""

from __future__ import annotations

import numpy as np

__all__ = ["mean_and_ci95"]


def mean_and_ci95(values: np.ndarray) -> tuple[float, float]:
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
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(values.size))
