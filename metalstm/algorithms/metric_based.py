"""Compare embeddings: nothing is adapted, any way and shot will do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import accuracy, task_loss, with_running_statistics
from metalstm.base import (
    Array,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    PyTree,
    make_algorithm,
)

__all__ = ["nearest_neighbour", "prototypical"]


def _squared_distances(a: Array, b: Array) -> Array:
    """[M, d], [N, d] -> [M, N]."""
    cross = a @ b.T
    return jnp.square(a).sum(-1)[:, None] - 2 * cross + jnp.square(b).sum(-1)[None]


def nearest_neighbour() -> MetaAlgorithm:
    """A floor: the label of the support image whose pixels are closest.

    ``predict`` scores a class by minus the smallest squared distance.
    """

    def predict(meta_params, key, support: Batch, query_x, *, num_classes: int):
        del meta_params, key
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        distances = _squared_distances(flat(query_x), flat(support.x))  # [M, N]
        own = support.y[None, :] == jnp.arange(num_classes)[:, None]  # [way, N]
        masked = jnp.where(own[None], distances[:, None, :], jnp.inf)
        return -masked.min(-1)

    return make_algorithm(
        init=lambda key, episode: (), predict=predict, trainable=False
    )


def prototypical(
    learner: Learner, *, train_way: int | None = None, train_queries: int | None = None
) -> MetaAlgorithm:
    """Prototypical networks (Snell et al., 2017), squared Euclidean distance.

    Scores are minus the distance to each class's mean embedding (equations 1 and 2).
    Meta-training normalises support and query together by their own statistics;
    meta-test uses averages over meta-training (``query_norm="frozen"``).

    Args:
      learner: its outputs are the embedding.
      train_way: classes in a meta-training task; the paper's is higher than the test's.
      train_queries: queries a class in meta-training.
    """

    def scores(embedded_support, labels, embedded_query, way: int):
        onehot = jax.nn.one_hot(labels, way, dtype=embedded_support.dtype)  # [N, way]
        sums = onehot.T @ embedded_support
        prototypes = sums / jnp.maximum(onehot.sum(0), 1)[:, None]
        return -_squared_distances(embedded_query, prototypes)

    def loss_and_stats(state: LearnerState, key: Array, episode: Episode):
        support, query = episode
        images = jnp.concatenate([support.x, query.x])
        embedded, after = learner.apply(state, images, norm="gather", key=key)
        num_support = support.x.shape[0]
        # labels are balanced, so way is not needed: one column a support image's class
        way = train_way if train_way is not None else num_support
        out = scores(embedded[:num_support], support.y, embedded[num_support:], way)
        out = jnp.where(jnp.arange(way)[None] <= support.y.max(), out, -jnp.inf)
        metrics = {"accuracy": accuracy(out, query.y)}
        return task_loss(out, query.y), (metrics, lax.stop_gradient(after.stats))

    def loss(state, key, episode):
        value, (metrics, _) = loss_and_stats(state, key, episode)
        return value, metrics

    def predict(state, key, support: Batch, query_x, *, num_classes: int):
        del key
        embedded, _ = learner.apply(state, support.x, norm="stored")
        query, _ = learner.apply(state, query_x, norm="stored")
        return scores(embedded, support.y, query, num_classes)

    def train_sampler(spec):
        changes = {"way": train_way, "queries": train_queries}
        changes = {name: n for name, n in changes.items() if n is not None}
        return dataclasses.replace(spec, **changes) if changes else spec

    slots: dict[str, Any] = with_running_statistics(
        loss_and_stats,
        read=lambda state: state.stats,
        write=lambda state, stats: state._replace(stats=stats),
    )

    def init(key: Array, episode: Episode) -> PyTree:
        return learner.init(key, episode.support.x[:1])

    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        train_sampler=train_sampler,
        query_norm="frozen",
        **slots,
    )
