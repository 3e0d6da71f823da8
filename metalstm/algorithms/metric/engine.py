"""One engine for methods that embed a task's images and score the queries.

Nothing is adapted at meta-test. Metric methods, hallucination and the external memory
differ in their `Comparison` alone.

Shapes: N support and M query images, d features; an embedding is [d], or a map
[h, w, c] where a comparison takes maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import (
    accuracy,
    make_algorithm,
    resampled,
    stop_statistics,
    task_loss,
    with_running_statistics,
)
from metalstm.base import (
    Array,
    Aux,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    Norm,
    PyTree,
)
from metalstm.batches import (
    first_example,
    join_examples,
    labels_of,
    mask_of,
    num_examples,
    only_present,
)
from metalstm.nn.heads import output_shape

__all__ = [
    "Compared",
    "Comparison",
    "compare_embeddings",
    "cross_entropy",
    "embedding_state",
    "stateless",
]


class Comparison(NamedTuple):
    """How a task's embeddings become scores, and what is learned for that."""

    # (state, key, support [N, ...], labels [N], query [M, ...], *, way, norm)
    # -> scores [M, way], state
    apply: Callable[..., tuple[Array, LearnerState]]
    # (key, one embedding [1, ...]) -> state; None when nothing is learned
    init: Callable[[Array, Array], LearnerState] | None = None
    # of the comparison's part of the meta-parameters, next to "embedding"
    name: str = "comparison"
    # key -> the keys that draw the learner and the comparison
    split_key: Callable[[Array], Any] = lambda key: (
        key,
        jax.random.fold_in(key, 1),
    )


def stateless(
    scores: Callable[..., Array], init_params: Callable[..., PyTree] | None = None
) -> Comparison:
    """Make a comparison without batch statistics.

    Args:
      scores: ``(params, support, labels, query, way) -> [M, way]``.
      init_params: ``(key, one embedding [1, ...]) -> params``; None: ``()``.
    """

    def apply(state, key, support, labels, query, *, way: int, norm: Norm):
        del key, norm
        return scores(state.params, support, labels, query, way), state

    if init_params is None:
        return Comparison(apply)
    return Comparison(
        apply, lambda key, embedded: LearnerState(init_params(key, embedded), {}, {})
    )


class Compared(NamedTuple):
    """What a loss may read of one meta-training episode."""

    embedded: Array  # [N + M, ...], the support set's first
    labels: Array  # [N + M]
    scores: Array  # [M, way], of the query; -inf for a class the episode lacks
    targets: Array  # [M]
    mask: Array | None = None  # [M], False for what is no query; None: all are


def cross_entropy(compared: Compared) -> Array:
    """Return the cross-entropy of the query's scores, the default loss."""
    return task_loss(compared.scores, compared.targets, compared.mask)


def compare_embeddings(
    learner: Learner,
    comparison: Comparison,
    *,
    loss_fn: Callable[[Compared], Array] = cross_entropy,
    train_way: int | None = None,
    train_queries: int | None = None,
    masked: bool = False,
    train_learner: bool = True,
) -> MetaAlgorithm:
    """Embed support and query by ``learner``, score by ``comparison``.

    Meta-training normalises support and query together by their batch statistics;
    meta-test uses averages over meta-training (``query_norm="frozen"``). The
    meta-parameters are the learner's state; where the comparison learns too, each part
    of that state is ``{"embedding", comparison.name}``.

    Args:
      loss_fn: default: cross-entropy of the scores.
      train_way: classes in a meta-training task; the test's may be another number.
      train_queries: queries a class in meta-training.
      masked: the comparison reads nothing of support rows with the label -1, and the
        loss nothing of queries that its mask leaves out.
      train_learner: False: only the comparison is meta-trained; the learner stays as it
        is, the averages of its batch norm included.
    """
    train_norm: Norm = "gather" if train_learner else "stored"

    def init(key: Array, episode: Episode) -> LearnerState:
        learner_key, comparison_key = comparison.split_key(key)
        x = first_example(episode.support.x)
        state = learner.init(learner_key, x)
        if comparison.init is None:
            return state
        one = output_shape(learner, state, x)
        learned = comparison.init(comparison_key, jnp.zeros(one.shape, one.dtype))
        return _join(state, learned, comparison.name)

    scores_of = functools.partial(_scores_of, learner, comparison)

    def loss(state: LearnerState, key: Array, episode: Episode):
        support, query = episode
        if not train_learner:
            state = _with_fixed_embedding(state, comparison.name)
        # no task has more classes than support images
        way = num_examples(support.x) if train_way is None else train_way
        scores, embedded, stats = scores_of(
            stop_statistics(state),
            key,
            support,
            query.x,
            way=way,
            norm=train_norm,
            dropout_key=key if train_learner else None,
        )
        if mask_of(support) is None:
            present = jnp.zeros(way, bool).at[support.y].set(True)[None]
            scores = jnp.where(present, scores, -jnp.inf)
        mask = mask_of(query)
        labels = jnp.concatenate([support.y, query.y])
        metrics = {"accuracy": accuracy(scores, query.y, mask)}
        value = loss_fn(Compared(embedded, labels, scores, query.y, mask))
        return value, Aux(metrics, lax.stop_gradient(stats))

    def predict(state, key, support: Batch, query_x, *, num_classes: int):
        scores, _, _ = scores_of(
            state, key, support, query_x, way=num_classes, norm="stored"
        )
        return scores

    slots: dict[str, Any] = with_running_statistics(
        loss,
        read=lambda state: state.stats,
        write=lambda state, stats: state._replace(stats=stats),
    )
    if not train_learner:  # whatever the optimizer does, such as weight decay
        name = comparison.name
        slots = {
            "init_carry": lambda key, state, episode: _split(state, name)[0],
            "absorb": lambda state, kept: _join(kept, _split(state, name)[1], name),
        }
    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        train_sampler=resampled(way=train_way, queries=train_queries),
        query_norm="frozen",
        masked=masked,
        **slots,
    )


def _scores_of(
    learner: Learner,
    comparison: Comparison,
    state: LearnerState,
    key: Array,
    support: Batch,
    query_x: Array,
    *,
    way: int,
    norm: Norm,
    dropout_key: Array | None = None,
) -> tuple[Array, Array, PyTree]:
    """Return scores [M, way], embeddings [N + M, ...] and batch statistics."""
    embedding, learned = state, LearnerState((), {}, {})
    if comparison.init is not None:
        embedding, learned = _split(state, comparison.name)
    if (
        mask_of(support) is not None
        and norm == "gather"
        and jax.tree.leaves(state.stats)
    ):
        raise ValueError(
            "the learner has batch norm, whose statistics would count rows that are no "
            "examples: choose tasks of one size (EpisodeSpec), or a learner without it"
        )
    images = join_examples(support.x, query_x)
    embedded, embedding = learner.apply(embedding, images, norm=norm, key=dropout_key)
    of_support, of_query = jnp.split(embedded, [num_examples(support.x)])
    scores, learned = comparison.apply(
        learned, key, of_support, labels_of(support), of_query, way=way, norm=norm
    )
    scores = only_present(scores, support)
    if comparison.init is not None:
        embedding = _join(embedding, learned, comparison.name)
    return scores, embedded, embedding.stats


def _with_fixed_embedding(state: LearnerState, name: str) -> LearnerState:
    """No gradient reaches what embeds."""
    embedding, learned = _split(state, name)
    return _join(lax.stop_gradient(embedding), learned, name)


_LEARNED_PARTS = ("comparison", "generator", "memory_net")


def embedding_state(meta_params: LearnerState | MetaParams) -> LearnerState:
    """Return the state of the embedding alone, of a method that compares embeddings.

    With it ``learner.apply(state, x, norm="stored")`` embeds. Of a pre-trained
    classifier it is the body without its head.
    """
    if isinstance(meta_params, MetaParams):
        state = meta_params.learner
        return state._replace(params=state.params["body"])
    parts = meta_params.params
    for name in _LEARNED_PARTS:
        if isinstance(parts, dict) and set(parts) == {"embedding", name}:
            return _split(meta_params, name)[0]
    return meta_params


def _join(embedding: LearnerState, learned: LearnerState, name: str) -> LearnerState:
    parts = zip(embedding, learned, strict=True)
    return LearnerState(*({"embedding": a, name: b} for a, b in parts))


def _split(state: LearnerState, name: str) -> tuple[LearnerState, LearnerState]:
    return (
        LearnerState(*(part["embedding"] for part in state)),
        LearnerState(*(part[name] for part in state)),
    )
