"""Intervals over episodes, instances and seeds."""

from __future__ import annotations

import numpy as np

__all__ = ["mean_and_ci95"]


def mean_and_ci95(values: np.ndarray) -> tuple[float, float]:
    """The mean and 1.96 standard errors (n - 1 in the variance)."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        raise ValueError(f"a confidence interval needs 2 values or more: {values.size}")
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(values.size))
