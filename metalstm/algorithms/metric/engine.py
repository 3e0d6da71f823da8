"""One engine for methods that embed and compare: nothing is adapted at meta-test.

Shapes: N support and M query images, d features; an embedding is [d], or a map
[h, w, c] where a comparison takes maps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metalstm.algorithms.common import accuracy, task_loss, with_running_statistics
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
    make_algorithm,
)

__all__ = [
    "Compared",
    "Comparison",
    "Distance",
    "Scale",
    "class_means",
    "compare_embeddings",
    "embedding_state",
    "make_scale",
    "nearest_of_class",
    "one_distance",
    "similarities",
    "squared_distances",
    "stateless",
    "unit",
    "with_train_options",
]

Distance = Literal["cosine", "euclidean"]
"""``euclidean`` is the squared distance, as the papers use it."""

Scale = float | Literal["learned"] | None
"""What similarities are multiplied by; None: each method's own default."""


def squared_distances(a: Array, b: Array) -> Array:
    """[M, d], [N, d] -> [M, N]."""
    cross = a @ b.T
    return jnp.square(a).sum(-1)[:, None] - 2 * cross + jnp.square(b).sum(-1)[None]


def unit(x: Array) -> Array:
    """[..., d] scaled to length 1; smooth at zero, where a ReLU may put features."""
    return x * lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def similarities(a: Array, b: Array, distance: Distance) -> Array:
    """[M, d], [N, d] -> [M, N]: cosines, or minus squared distances.

    Raises:
      ValueError: embeddings that are not vectors.
    """
    if a.ndim != 2:
        raise ValueError(
            f"an embedding has the shape {a.shape[1:]}, but what is compared is one "
            "vector an image: flatten the learner's outputs to [N, d]"
        )
    if distance == "cosine":
        return unit(a) @ unit(b).T
    return -squared_distances(a, b)


def class_means(embedded: Array, labels: Array, way: int) -> Array:
    """[N, ...] -> [way, ...]; zero for a class without images."""
    onehot = jax.nn.one_hot(labels, way, dtype=embedded.dtype)
    sums = jnp.tensordot(onehot.T, embedded, 1)
    counts = jnp.maximum(onehot.sum(0), 1)
    return sums / counts.reshape(-1, *[1] * (embedded.ndim - 1))


def nearest_of_class(distances: Array, labels: Array, way: int) -> Array:
    """[M, N] -> scores [M, way]: minus the distance to a class's nearest image."""
    own = labels[None, :] == jnp.arange(way)[:, None]
    return -jnp.where(own[None], distances[:, None, :], jnp.inf).min(-1)


class Comparison(NamedTuple):
    """How embeddings become scores, and what is learned for that."""

    # (state, support [N, ...], labels [N], query [M, ...], *, way, norm)
    # -> scores [M, way], state
    apply: Callable[..., tuple[Array, LearnerState]]
    # (key, one embedding [1, ...]) -> state; None when nothing is learned
    init: Callable[[Array, Array], LearnerState] | None = None


def stateless(
    scores: Callable[..., Array], init_params: Callable[..., PyTree] | None = None
) -> Comparison:
    """A comparison without batch statistics.

    Args:
      scores: ``(params, support, labels, query, way) -> [M, way]``.
      init_params: ``(key, one embedding [1, ...]) -> params``; None: ``()``.
    """

    def apply(state, support, labels, query, *, way: int, norm: Norm):
        del norm
        params = () if init_params is None else state.params
        return scores(params, support, labels, query, way), state

    if init_params is None:
        return Comparison(apply)
    return Comparison(
        apply, lambda key, embedded: LearnerState(init_params(key, embedded), {}, {})
    )


def make_scale(scale: Scale, start: float) -> tuple[PyTree, Callable[[PyTree], Any]]:
    """The learned parameter of a scale, {} when it is fixed, and how it is read.

    A learned scale starts at ``start`` and stays positive, since its logarithm is
    what is learned; a scale of None is fixed at ``start``.

    Raises:
      ValueError: a scale that is neither positive nor "learned".
    """
    if scale == "learned":
        log_scale = {"log_scale": np.float32(math.log(start))}
        return log_scale, lambda params: jnp.exp(params["log_scale"])
    if isinstance(scale, str) or (scale is not None and not scale > 0):
        raise ValueError(f"scale={scale!r}: choose a number above 0, or 'learned'")
    return {}, lambda params: start if scale is None else scale


def one_distance(distance: str) -> None:
    """Raise ValueError for a distance that does not exist."""
    if distance not in get_args(Distance):
        choices = " or ".join(get_args(Distance))
        raise ValueError(f"distance={distance!r}: choose {choices}")


class Compared(NamedTuple):
    """What a loss may read of one meta-training episode."""

    embedded: Array  # [N + M, ...], the support set's first
    labels: Array  # [N + M]
    scores: Array  # [M, way], of the query; -inf for a class the episode lacks
    targets: Array  # [M]


def compare_embeddings(
    learner: Learner,
    comparison: Comparison,
    *,
    loss_fn: Callable[[Compared], Array] | None = None,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Embed support and query by ``learner``, score by ``comparison``.

    Meta-training normalises support and query together by their own statistics;
    meta-test uses averages over meta-training (``query_norm="frozen"``). The
    meta-parameters are the learner's state, and where the comparison learns too, a
    state of ``{"embedding", "comparison"}``.

    Args:
      loss_fn: default: cross-entropy of the scores.
      train_way: classes in a meta-training task; the test's may be another number.
      train_queries: queries a class in meta-training.
    """

    def init(key: Array, episode: Episode) -> LearnerState:
        x = episode.support.x[:1]
        state = learner.init(key, x)
        if comparison.init is None:
            return state
        embedded, _ = jax.eval_shape(
            lambda s: learner.apply(s, x, norm="stored"), state
        )
        one = jnp.zeros(embedded.shape, embedded.dtype)
        return _join(state, comparison.init(jax.random.fold_in(key, 1), one))

    def run(state, support: Batch, query_x, *, way: int, norm: Norm, key=None):
        embedding, compared = state, LearnerState((), {}, {})
        if comparison.init is not None:
            embedding, compared = _split(state)
        images = jnp.concatenate([support.x, query_x])
        embedded, embedding = learner.apply(embedding, images, norm=norm, key=key)
        first, rest = jnp.split(embedded, [support.x.shape[0]])
        scores, compared = comparison.apply(
            compared, first, support.y, rest, way=way, norm=norm
        )
        if comparison.init is not None:
            embedding = _join(embedding, compared)
        return scores, embedded, embedding.stats

    def loss(state: LearnerState, key: Array, episode: Episode):
        support, query = episode
        stats, other = lax.stop_gradient((state.stats, state.other))
        state = state._replace(stats=stats, other=other)
        # no task has more classes than support images
        way = support.x.shape[0] if train_way is None else train_way
        scores, embedded, stats = run(
            state, support, query.x, way=way, norm="gather", key=key
        )
        present = jnp.arange(way)[None] <= support.y.max()
        scores = jnp.where(present, scores, -jnp.inf)
        labels = jnp.concatenate([support.y, query.y])
        if loss_fn is None:
            value = task_loss(scores, query.y)
        else:
            value = loss_fn(Compared(embedded, labels, scores, query.y))
        metrics = {"accuracy": accuracy(scores, query.y)}
        return value, Aux(metrics, lax.stop_gradient(stats))

    def predict(state, key, support: Batch, query_x, *, num_classes: int):
        del key
        return run(state, support, query_x, way=num_classes, norm="stored")[0]

    slots: dict[str, Any] = with_running_statistics(
        loss,
        read=lambda state: state.stats,
        write=lambda state, stats: state._replace(stats=stats),
    )
    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        train_sampler=with_train_options(train_way, train_queries),
        query_norm="frozen",
        **slots,
    )


def with_train_options(
    train_way: int | None, train_queries: int | None
) -> Callable[[Any], Any]:
    """A `MetaAlgorithm.train_sampler`: the test's spec with other numbers."""
    changes = {"way": train_way, "queries": train_queries}
    changes = {name: n for name, n in changes.items() if n is not None}
    return lambda spec: dataclasses.replace(spec, **changes) if changes else spec


def embedding_state(meta_params: LearnerState | MetaParams) -> LearnerState:
    """Return the state of the embedding alone, of a method that compares embeddings.

    With it ``learner.apply(state, x, norm="stored")`` embeds. Of a pre-trained
    classifier it is the body without its head.
    """
    if isinstance(meta_params, MetaParams):
        state = meta_params.learner
        return state._replace(params=state.params["body"])
    parts = meta_params.params
    if isinstance(parts, dict) and set(parts) == {"embedding", "comparison"}:
        return _split(meta_params)[0]
    if isinstance(parts, dict) and set(parts) == {"embedding", "generator"}:
        return meta_params._replace(params=parts["embedding"])
    return meta_params


def _join(embedding: LearnerState, comparison: LearnerState) -> LearnerState:
    parts = zip(embedding, comparison, strict=True)
    return LearnerState(*({"embedding": a, "comparison": b} for a, b in parts))


def _split(state: LearnerState) -> tuple[LearnerState, LearnerState]:
    return (
        LearnerState(*(part["embedding"] for part in state)),
        LearnerState(*(part["comparison"] for part in state)),
    )
