"""Siamese networks: one embedding, trained on pairs or triplets of images.

Shapes: N images with labels, d features.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from metalstm.algorithms.metric.distances import (
    nearest_of_class,
    squared_distances,
    unit,
)
from metalstm.algorithms.metric.engine import (
    Compared,
    compare_embeddings,
    stateless,
)
from metalstm.base import Array, Learner, MetaAlgorithm
from metalstm.checks import check_choice, check_positive
from metalstm.records import recorded

__all__ = ["contrastive_loss", "siamese", "triplet_loss"]


@recorded("algorithm")
def siamese(
    learner: Learner,
    *,
    loss: Literal["contrastive", "triplet"] = "contrastive",
    margin: float | None = None,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Siamese networks: learn which images share a class; the nearest decides.

    Embeddings have length 1. All images of a meta-training task, support and query,
    are compared with each other; at meta-test a class scores minus the squared
    distance to its nearest support image. The meta-parameters are the learner's state:
    `metalstm.verification.verify` takes them as they are.

    Args:
      learner: its outputs [N, d] are the embedding.
      loss: `contrastive_loss` or `triplet_loss`.
      margin: None: 1 for ``contrastive``, 0.2 for ``triplet``, as published.
      train_way: classes in a meta-training task; the test's may be another number.
      train_queries: queries a class in meta-training.

    Raises:
      ValueError: at construction for another loss, or a margin that is not positive.
    """
    losses = {"contrastive": (contrastive_loss, 1.0), "triplet": (triplet_loss, 0.2)}
    check_choice("loss", loss, losses)
    pair_loss, published = losses[loss]
    chosen = published if margin is None else margin
    check_positive("margin", chosen)

    def scores(params, support, labels, query, way: int):
        del params
        distances = squared_distances(unit(query), unit(support))
        return nearest_of_class(distances, labels, way)

    def loss_fn(compared: Compared) -> Array:
        return pair_loss(unit(compared.embedded), compared.labels, chosen)

    return compare_embeddings(
        learner,
        stateless(scores),
        loss_fn=loss_fn,
        train_way=train_way,
        train_queries=train_queries,
    )


def contrastive_loss(embedded: Array, labels: Array, margin: float) -> Array:
    """Hadsell et al. (2006), equation 4, over all pairs of [N, d].

    Half the mean of D^2 over pairs of one class, and half the mean of
    max(0, margin - D)^2 over pairs of two: as if both kinds were drawn equally often.
    """
    squared = squared_distances(embedded, embedded)
    # the root of zero has no derivative
    distance = jnp.sqrt(squared + 1e-8)
    same, different = _pairs(labels)
    apart = jnp.square(jnp.maximum(margin - distance, 0))
    return 0.5 * _mean(squared, same) + 0.5 * _mean(apart, different)


def triplet_loss(embedded: Array, labels: Array, margin: float) -> Array:
    """Schroff et al. (2015), equation 3, over all triplets of [N, d].

    The mean of max(0, D(a, p)^2 - D(a, n)^2 + margin) over the triplets where it is
    positive (Hermans et al., 2017, "batch all"): easy ones would drown the others.
    Takes memory of the order of N^3.
    """
    squared = squared_distances(embedded, embedded)
    same, different = _pairs(labels)
    excess = squared[:, :, None] - squared[:, None, :] + margin
    valid = same[:, :, None] & different[:, None, :]
    return _mean(excess, valid & (excess > 0))


def _pairs(labels: Array) -> tuple[Array, Array]:
    """[N, N] each: pairs of two images of one class, and of two classes."""
    equal = labels[:, None] == labels[None, :]
    return equal & ~jnp.eye(labels.shape[0], dtype=bool), ~equal


def _mean(values: Array, mask: Array) -> Array:
    num = jnp.maximum(mask.sum(dtype=values.dtype), 1)
    return jnp.where(mask, values, 0).sum() / num
