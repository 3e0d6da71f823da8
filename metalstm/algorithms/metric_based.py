"""Compare embeddings: nothing is adapted, any way and shot will do."""

from __future__ import annotations

from metalstm.algorithms.comparing import (
    Distance,
    Scale,
    class_means,
    compare_embeddings,
    make_scale,
    nearest_of_class,
    one_distance,
    similarities,
    squared_distances,
    stateless,
)
from metalstm.base import Batch, Learner, MetaAlgorithm, make_algorithm

__all__ = ["nearest_neighbour", "prototypical"]


def nearest_neighbour() -> MetaAlgorithm:
    """A floor: the label of the support image whose pixels are closest.

    ``predict`` scores a class by minus the smallest squared distance.
    """

    def predict(meta_params, key, support: Batch, query_x, *, num_classes: int):
        del meta_params, key
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        distances = squared_distances(flat(query_x), flat(support.x))
        return nearest_of_class(distances, support.y, num_classes)

    return make_algorithm(
        init=lambda key, episode: (), predict=predict, trainable=False
    )


def prototypical(
    learner: Learner,
    *,
    distance: Distance = "euclidean",
    scale: Scale = None,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Prototypical networks (Snell et al., 2017), equations 1 and 2.

    Scores are the scaled similarity to each class's mean embedding: minus the squared
    Euclidean distance as published, or the cosine.

    Args:
      learner: its outputs [N, d] are the embedding.
      scale: a number; "learned", from where None is; None: 1 for ``euclidean`` as
        published, "learned" from 10 for ``cosine``, which alone is too flat for a
        softmax.
      train_way: classes in a meta-training task; the paper's is higher than the test's.
      train_queries: queries a class in meta-training.

    Raises:
      ValueError: at construction for a distance or scale that does not exist.
    """
    params, read_scale = _scale_of(distance, scale)

    def scores(params, support, labels, query, way: int):
        prototypes = class_means(support, labels, way)
        return read_scale(params) * similarities(query, prototypes, distance)

    return compare_embeddings(
        learner,
        stateless(scores, (lambda key, embedded: params) if params else None),
        train_way=train_way,
        train_queries=train_queries,
    )


def _scale_of(distance: Distance, scale: Scale):
    """`make_scale` with the defaults of ``distance``."""
    one_distance(distance)
    if distance == "euclidean":
        return make_scale(scale, 1.0)
    return make_scale("learned" if scale is None else scale, 10.0)
