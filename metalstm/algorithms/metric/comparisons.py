"""The metric methods of the literature: nothing is adapted, any way and shot works.

Shapes: N support and M query images, d features.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from metalstm.algorithms.metric.distances import (
    Distance,
    Scale,
    class_means,
    similarities,
    similarity_scale,
)
from metalstm.algorithms.metric.engine import (
    Compared,
    Comparison,
    compare_embeddings,
    cross_entropy,
    stateless,
)
from metalstm.algorithms.metric.full_context import (
    init_context,
    query_in_context,
    support_in_context,
)
from metalstm.base import Array, Learner, MetaAlgorithm, Norm
from metalstm.checks import check_at_least, check_choice
from metalstm.records import recorded

__all__ = ["matching", "prototypical", "relation"]


@recorded("algorithm")
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
    params, read_scale = similarity_scale(distance, scale)

    def scores(params, support, labels, query, way: int):
        prototypes = class_means(support, labels, way)
        return read_scale(params) * similarities(query, prototypes, distance)

    comparison = stateless(scores, (lambda key, embedded: params) if params else None)
    return compare_embeddings(
        learner,
        comparison,
        train_way=train_way,
        train_queries=train_queries,
        masked=True,
    )


@recorded("algorithm")
def matching(
    learner: Learner,
    *,
    distance: Distance = "cosine",
    scale: Scale = None,
    context_steps: int | None = None,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Matching networks (Vinyals et al., 2016), equations 1 and 2.

    A query's distribution over classes is that of its attention over the support set,
    a(x, x_i) = softmax_i(scale * similarity(f(x), g(x_i))); scores are its logarithm.

    Args:
      learner: its outputs [N, d] are f' and g'.
      distance: "cosine" as published, or "euclidean", squared.
      scale: as for `prototypical`. Published: 1, where a softmax of cosines is nearly
        flat.
      context_steps: K steps of full context embeddings, learned LSTMs that let f and g
        see all of the support set; see `full_context`. None: without.
      train_way, train_queries: as for `prototypical`.

    Raises:
      ValueError: at construction for a distance, scale or number of steps that does
        not exist.
    """
    scale_params, read_scale = similarity_scale(distance, scale)
    if context_steps is not None:
        remedy = "or None for embeddings without context"
        check_at_least("context_steps", context_steps, 1, remedy)

    def init_params(key, embedded):
        if context_steps is None:
            return scale_params
        return scale_params | {"context": init_context(key, embedded.shape[-1])}

    def scores(params, support, labels, query, way: int):
        if context_steps is not None:
            support = support_in_context(params["context"], support)
            query = query_in_context(params["context"], query, support, context_steps)
        similarity = read_scale(params) * similarities(query, support, distance)
        return _log_attention_of_classes(similarity, labels, way)

    learns = bool(scale_params) or context_steps is not None
    comparison = stateless(scores, init_params if learns else None)
    return compare_embeddings(
        learner,
        comparison,
        train_way=train_way,
        train_queries=train_queries,
        masked=context_steps is None,  # an LSTM reads every row
    )


def _log_attention_of_classes(similarity: Array, labels: Array, way: int) -> Array:
    """[M, N] -> [M, way]: the log of the sum of each class's softmax weights.

    >>> similarity, labels = jnp.log(jnp.array([[1.0, 1.0, 2.0]])), jnp.array([0, 0, 1])
    >>> jnp.exp(_log_attention_of_classes(similarity, labels, way=2)).round(4)
    Array([[0.5, 0.5]], dtype=float32)
    """
    similarity = jnp.where(labels[None] >= 0, similarity, -jnp.inf)  # -1: no example
    log_weights = jax.nn.log_softmax(similarity)
    is_class = labels[None, :] == jnp.arange(way)[:, None]
    # finite where a class has no image, so that the derivative is too
    masked = jnp.where(is_class[None], log_weights[:, None, :], -1e9)
    return jax.nn.logsumexp(masked, -1)


@recorded("algorithm")
def relation(
    learner: Learner,
    relation_net: Learner,
    *,
    train_way: int,
    loss: Literal["squared", "cross_entropy"] = "squared",
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Relation networks (Sung et al., 2018): a network learns how to compare.

    Scores are the logits g([c_k, f(x)]) of each class's mean embedding c_k and the
    query's, joined along the last axis (equation 1; the paper's *sum* over a class's
    images would have another size at another shot).

    Args:
      learner: its outputs are the embedding f: maps [N, h, w, c] as published
        (`metalstm.nn.conv4` with ``feature_maps=True, num_halvings=2``), or vectors.
      relation_net: g, from (classes [way, ...], queries [M, ...]) to [M, way]; see
        `metalstm.nn.relation_net`. Its batch statistics are those of all pairs of a
        meta-training task.
      train_way: classes in a meta-training task. Needed: a pair with a class that is
        not there would count in those statistics.
      loss: "squared": of the sigmoid to 1 for the query's class and 0 for the others,
        summed over classes (equation 2); "cross_entropy": softmax over classes (Chen
        et al., 2019).
      train_queries: queries a class in meta-training.

    Raises:
      ValueError: at construction for another loss; when traced for a relation_net with
        outputs of another shape.
    """
    losses = {"squared": _squared_error, "cross_entropy": cross_entropy}
    check_choice("loss", loss, losses)
    return compare_embeddings(
        learner,
        _pair_comparison(relation_net),
        loss_fn=losses[loss],
        train_way=train_way,
        train_queries=train_queries,
    )


def _pair_comparison(relation_net: Learner) -> Comparison:
    """Score each pair of a class's mean embedding and a query's by a network."""

    def init(key: Array, embedded: Array):
        pairs: Any = embedded, embedded  # a learner of two arrays
        return relation_net.init(key, pairs)

    def apply(state, key, support, labels, query, *, way: int, norm: Norm):
        del key
        pairs: Any = class_means(support, labels, way), query
        logits, state = relation_net.apply(state, pairs, norm=norm)
        if logits.shape != (query.shape[0], way):
            raise ValueError(
                f"relation_net returned shape {logits.shape} for {way} classes and "
                f"{query.shape[0]} queries: it must return a logit for each pair, "
                "[queries, classes]"
            )
        return logits, state

    return Comparison(apply, init)


def _squared_error(compared: Compared) -> Array:
    is_class = jax.nn.one_hot(compared.targets, compared.scores.shape[-1])
    errors = jax.nn.sigmoid(compared.scores) - is_class
    return jnp.square(errors).sum(-1).mean()
