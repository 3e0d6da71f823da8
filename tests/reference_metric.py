"""The comparisons of metric-based methods in numpy float64, one query at a time.

Written from the papers. N support images, M queries, d features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from reference import Lstm

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


def matching(
    support: Array, labels: Array, query: Array, way: int, distance: str, scale: float
) -> Array:
    """Vinyals et al. (2016), equations 1 and 2: probabilities [M, way]."""
    out = np.zeros((len(query), way))
    for row, q in zip(out, query, strict=True):
        attention = softmax(
            np.array([scale * similarity(q, s, distance) for s in support])
        )
        for weight, label in zip(attention, labels, strict=True):
            row[label] += weight
    return out


def relation(
    support: Array,
    labels: Array,
    query: Array,
    way: int,
    net: Callable[[Array], float],
) -> Array:
    """Sung et al. (2018), equation 1, of mean embeddings: logits [M, way]."""
    means = [support[labels == k].mean(0) for k in range(way)]
    return np.array([[net(np.concatenate([c, q])) for c in means] for q in query])


def relation_loss(logits: Array, targets: Array) -> float:
    """Equation 2, a mean over queries of the sum over classes."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        for k, logit in enumerate(row):
            total += (1 / (1 + np.exp(-logit)) - float(k == target)) ** 2
    return total / len(targets)


def contrastive(unit: Array, labels: Array, margin: float) -> float:
    """Hadsell et al. (2006), equation 4, both kinds of pairs weighing the same."""
    same, different = [], []
    for i in range(len(unit)):
        for j in range(i):
            distance = np.linalg.norm(unit[i] - unit[j])
            if labels[i] == labels[j]:
                same.append(distance**2)
            else:
                different.append(max(0.0, margin - distance) ** 2)
    return float(np.mean(same) + np.mean(different)) / 2


def triplet(unit: Array, labels: Array, margin: float) -> float:
    """Schroff et al. (2015), equation 3, a mean over the triplets that violate it."""
    violations = []
    for a in range(len(unit)):
        for p in range(len(unit)):
            for n in range(len(unit)):
                if a == p or labels[a] != labels[p] or labels[a] == labels[n]:
                    continue
                positive = np.sum((unit[a] - unit[p]) ** 2)
                negative = np.sum((unit[a] - unit[n]) ** 2)
                if positive - negative + margin > 0:
                    violations.append(positive - negative + margin)
    return float(np.mean(violations))


def margin_logits(
    features: Array, weights: Array, labels: Array, loss: str, m: float, s: float | None
) -> Array:
    """AM-softmax, equation 6; ArcFace, equation 3; SphereFace, equation 7."""
    out = np.zeros((len(features), len(weights)))
    for i, x in enumerate(features):
        for j, w in enumerate(weights):
            theta = np.arccos(cosine(x, w))
            value = np.cos(theta)
            if j == labels[i] and loss == "am_softmax":
                value = np.cos(theta) - m
            elif j == labels[i] and loss == "arcface":
                if theta + m <= np.pi:
                    value = np.cos(theta + m)
                else:
                    value = np.cos(theta) - m * np.sin(m)
            elif j == labels[i]:
                k = next(k for k in range(int(m)) if theta <= (k + 1) * np.pi / m)
                psi = (-1) ** k * np.cos(m * theta) - 2 * k
                value = (5 * np.cos(theta) + psi) / 6
            out[i, j] = (np.linalg.norm(x) if s is None else s) * value
    return out


def support_in_context(support: Array, forward: Lstm, backward: Lstm) -> Array:
    """Appendix A.2: a bidirectional LSTM over the support set, with a skip."""

    def read(cell: Lstm, rows: Array) -> list[Array]:
        h = c = np.zeros((1, support.shape[1]))
        out = []
        for row in rows:
            h, c = cell.step(row[None], h, c)
            out.append(h[0])
        return out

    ahead, behind = read(forward, support), read(backward, support[::-1])[::-1]
    return np.stack([a + b + x for a, b, x in zip(ahead, behind, support, strict=True)])


def query_in_context(query: Array, support: Array, cell: Lstm, steps: int) -> Array:
    """Appendix A.1, equations 3 to 6, one query at a time; g = ``support``."""
    out = []
    for x in query:
        h = c = np.zeros(len(x))
        for _ in range(steps):
            r = softmax(np.array([h @ g for g in support])) @ support
            inputs = np.concatenate([x, r])
            h_hat, c_new = cell.step(inputs[None], h[None], c[None])
            h, c = h_hat[0] + x, c_new[0]
        out.append(h)
    return np.stack(out)
