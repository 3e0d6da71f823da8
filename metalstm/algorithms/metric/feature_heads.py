"""Heads on features without tuning: closed forms, and one convex problem solved.

What is done with a frozen backbone, whose features are the examples (`data.embed`).
Shapes: N support and M query examples, d features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import make_algorithm
from metalstm.algorithms.metric.distances import (
    class_means,
    nearest_of_class,
    similarities,
    squared_distances,
    unit,
)
from metalstm.base import Array, Batch, MetaAlgorithm, PyTree
from metalstm.batches import as_vectors, labels_of, only_present
from metalstm.checks import check_at_least, check_positive
from metalstm.data.pools import ClassPool
from metalstm.records import recorded
from metalstm.runtime.products import precise_matmul

__all__ = [
    "HEADS",
    "base_mean",
    "logistic_regression",
    "logistic_scores",
    "nearest_centroid",
    "nearest_neighbour",
    "neighbour_scores",
    "ridge",
    "ridge_scores",
]

Head = Callable[[Array, Array, Array, int], Array]
"""(support [N, d], labels [N], query [M, d], way) -> scores [M, way]."""

_TOLERANCE = 1e-5  # of a probability, where logistic regression has converged
_MOST_STEPS = 10_000


@recorded("algorithm")
def nearest_centroid(*, unit_length: bool = True) -> MetaAlgorithm:
    """Minus the squared distance to each class's mean feature vector.

    With `base_mean` and length 1 it is SimpleShot's CL2N (Wang et al., 2019): a
    baseline that many meta-learners do not beat. The meta-parameters of this and the
    other heads are () for features as they are, or a mean [d] to subtract first;
    nothing is meta-trained.

    Args:
      unit_length: scale each example, after centring, to length 1.
    """
    return _on_features(_centroid_scores, unit_length, masked=True)


@recorded("algorithm")
def nearest_neighbour(
    *, num_neighbours: int = 1, unit_length: bool = False
) -> MetaAlgorithm:
    """The label of the closest support example, or the most frequent of several.

    On images it is the baseline that compares pixels. With one neighbour a class
    scores minus its smallest squared distance; with k the number of its examples among
    the k nearest, where less than a vote goes to the class of the nearer one.

    Args:
      num_neighbours: k.
      unit_length: as for `nearest_centroid`.

    Raises:
      ValueError: k below 1; from ``predict``, k above the number of support examples.
    """
    check_at_least("num_neighbours", num_neighbours, 1)
    head = functools.partial(neighbour_scores, num_neighbours=num_neighbours)
    return _on_features(head, unit_length)


@recorded("algorithm")
def ridge(*, penalty: float = 1.0, unit_length: bool = True) -> MetaAlgorithm:
    """Linear regression to one-hot labels with an L2 penalty, in closed form.

    `ridge_scores`; the base learner of Bertinetto et al. (2019), without what they
    learn around it.

    Args:
      penalty: lambda.
      unit_length: as for `nearest_centroid`.

    Raises:
      ValueError: a penalty that is not above 0.
    """
    check_positive("penalty", penalty)
    return _on_features(functools.partial(ridge_scores, penalty=penalty), unit_length)


@recorded("algorithm")
def logistic_regression(
    *, penalty: float = 1.0, unit_length: bool = True
) -> MetaAlgorithm:
    """Softmax regression with an L2 penalty, to convergence.

    `logistic_scores`; on features of length 1 a strong baseline (Tian et al., 2020).

    Args:
      penalty: lambda, 1 / C of scikit-learn.
      unit_length: as for `nearest_centroid`.

    Raises:
      ValueError: a penalty that is not above 0.
    """
    check_positive("penalty", penalty)
    head = functools.partial(logistic_scores, penalty=penalty)
    return _on_features(head, unit_length)


def base_mean(pool: ClassPool) -> Array:
    """Return the mean example of a pool, flat [d]: the base classes' mean feature.

    It is the meta-parameters of the heads here: ``evaluate(nearest_centroid(),
    base_mean(features.train), features.test, spec)``.
    """
    images = pool.images
    x = images.reshape(len(images), -1).astype(jnp.float32)
    return x.mean(0) / 255 if images.dtype == jnp.uint8 else x.mean(0)


def _on_features(head: Head, unit_length: bool, masked: bool = False) -> MetaAlgorithm:
    def prepare(mean: PyTree, x: PyTree) -> Array:
        x = as_vectors(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if jax.tree.leaves(mean):
            if mean.shape != x.shape[1:]:
                raise ValueError(
                    f"the mean to subtract has shape {mean.shape} and an example "
                    f"{x.shape[1]} features: give base_mean of a pool of such examples"
                )
            x = x - mean[None]
        return unit(x) if unit_length else x

    def predict(mean, key, support: Batch, query_x, *, num_classes: int):
        del key
        features, query = prepare(mean, support.x), prepare(mean, query_x)
        scores = head(features, labels_of(support), query, num_classes)
        return only_present(scores, support)

    return make_algorithm(
        init=lambda key, episode: (), predict=predict, trainable=False, masked=masked
    )


def _centroid_scores(support: Array, labels: Array, query: Array, way: int) -> Array:
    means = class_means(support, labels, way)
    return similarities(query, means, "euclidean")


def _cosine_scores(support: Array, labels: Array, query: Array, way: int) -> Array:
    return similarities(query, class_means(support, labels, way), "cosine")


def neighbour_scores(
    support: Array, labels: Array, query: Array, way: int, *, num_neighbours: int = 1
) -> Array:
    """Return votes of the nearest [M, way], or minus the smallest squared distance."""
    distances = squared_distances(query, support)
    if num_neighbours == 1:
        return nearest_of_class(distances, labels, way)
    num = support.shape[0]
    if num_neighbours > num:
        raise ValueError(
            f"num_neighbours={num_neighbours} of {num} support examples: choose {num} "
            "or fewer"
        )
    order = jnp.argsort(distances, axis=-1)[:, :num_neighbours]
    voted = jax.nn.one_hot(labels[order], way, dtype=distances.dtype)  # [M, k, way]
    # a class's nearest example decides ties: less than a vote, and distinct
    nearness = 1 / (2 + jnp.arange(num_neighbours, dtype=voted.dtype))
    return voted.sum(1) + (voted * nearness[None, :, None]).max(1)


def ridge_scores(
    support: Array, labels: Array, query: Array, way: int, *, penalty: float = 1.0
) -> Array:
    """Return Q W of the W that minimises |X W - Y|^2 + lambda |W|^2, [M, way].

    W = X^T (X X^T + lambda I)^-1 Y for one-hot Y (Bertinetto et al., 2019, equation 6):
    a system of N equations however many features there are.
    """
    kernel, of_query, onehot = _kernels(support, labels, query, way)
    regular = kernel + penalty * jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    return precise_matmul(of_query, jnp.linalg.solve(regular, onehot))


def logistic_scores(
    support: Array, labels: Array, query: Array, way: int, *, penalty: float = 1.0
) -> Array:
    """Return the logits [M, way] of softmax regression with an L2 penalty.

    W minimises sum_i -log softmax(x_i W)_{y_i} + lambda / 2 |W|^2. The bias is one more
    weight, of a constant feature 1. W = X^T A, and the optimum is where
    A = (Y - P) / lambda. With the bound of Boehning (1992) on the softmax's Hessian,

        A <- A + (K / 2 + lambda I)^-1 (Y - P - lambda A),  K = X X^T,

    lowers the loss in every step; Nesterov's momentum makes it fast. It ends where
    Y - P - lambda A is below 1e-5 everywhere.

    Returns:
      Logits; NaN where 10,000 steps do not suffice, as for penalties below some 1e-4.
    """
    kernel, of_query, onehot = _kernels(support, labels, query, way)
    kernel, of_query = kernel + 1, of_query + 1
    identity = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    step_matrix = jnp.linalg.inv(kernel / 2 + penalty * identity)
    # the least curvature as a share of the bound's, whose largest eigenvalue is at most
    # the trace
    share = jnp.sqrt(penalty / (jnp.trace(kernel) / 2 + penalty))
    momentum = (1 - share) / (1 + share)

    def unfinished(state):
        _, _, error, step = state
        return (error > _TOLERANCE) & (step < _MOST_STEPS)

    def advance(state):
        dual, before, _, step = state
        ahead = dual + momentum * (dual - before)
        chances = jax.nn.softmax(precise_matmul(kernel, ahead))
        residual = onehot - chances - penalty * ahead
        new = ahead + precise_matmul(step_matrix, residual)
        return new, dual, jnp.abs(residual).max(), step + 1

    start = jnp.zeros_like(onehot)
    infinite = jnp.asarray(jnp.inf, onehot.dtype)
    dual, _, error, _ = lax.while_loop(
        unfinished, advance, (start, start, infinite, jnp.int32(0))
    )
    scores = precise_matmul(of_query, dual)
    return jnp.where(error <= _TOLERANCE, scores, jnp.nan)


def _kernels(
    support: Array, labels: Array, query: Array, way: int
) -> tuple[Array, Array, Array]:
    """Return X X^T [N, N], Q X^T [M, N] and one-hot labels [N, way]."""
    onehot = jax.nn.one_hot(labels, way, dtype=support.dtype)
    kernel, of_query = (precise_matmul(x, support.T) for x in (support, query))
    return kernel, of_query, onehot


def _at_unit_length(head: Head) -> Head:
    return lambda support, labels, query, way: head(
        unit(support), labels, unit(query), way
    )


HEADS: dict[str, Head] = {
    "neighbour": neighbour_scores,
    "centroid": _centroid_scores,
    "cosine": _cosine_scores,
    "ridge": _at_unit_length(ridge_scores),
    "logistic": _at_unit_length(logistic_scores),
}
"""What pre-trained features are compared by: `pretrained_features(compare=...)`."""
