"""The comparisons of metric-based methods in numpy float64, one query at a time.

Written from the papers. N support images, M queries, d features.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def similarity(a: Array, b: Array, distance: str) -> float:
    if distance == "cosine":
        return cosine(a, b)
    return -float(np.sum((a - b) ** 2))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def prototypical(
    support: Array, labels: Array, query: Array, way: int, distance: str, scale: float
) -> Array:
    """Snell et al. (2017), equations 1 and 2: scores [M, way]."""
    prototypes = [support[labels == k].mean(0) for k in range(way)]
    return np.array(
        [[scale * similarity(q, c, distance) for c in prototypes] for q in query]
    )
