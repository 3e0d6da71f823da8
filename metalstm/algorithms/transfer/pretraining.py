"""Transfer floors: pre-train one classifier, then compare or fine-tune its features.

What meta-learning must beat (Ravi & Larochelle, 2017; Chen et al., 2019, "A Closer Look
at Few-shot Classification"). Shapes: C classes of meta-training, d features, way
classes of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.algorithms.common import accuracy, task_loss, with_running_statistics
from metalstm.algorithms.metric.engine import (
    class_means,
    nearest_of_class,
    similarities,
    squared_distances,
    unit,
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
    UpdateRule,
    make_algorithm,
)
from metalstm.data.classification import ClassificationSpec
from metalstm.inner import first_order, unroll
from metalstm.rules import tunable

__all__ = ["features_of", "fine_tuning", "pretrained_features", "pretraining_slots"]

Classifier = Literal["linear", "cosine"]
_COSINE_SCALE = 10.0  # cosines alone are too flat for a softmax


def pretrained_features(
    learner: Learner,
    num_classes: int,
    *,
    compare: Literal["neighbour", "centroid", "cosine"] = "centroid",
    classifier: Classifier = "linear",
    batch_size: int | None = None,
) -> MetaAlgorithm:
    """Pre-train one classifier over all classes, then compare its features.

    Meta-training draws batches of labelled images (`train_sampler`) and learns the
    features and a head of C classes by cross-entropy; the head is then left alone.
    Batch norm uses averages over pre-training (``query_norm="frozen"``).

    Args:
      learner: returns features [N, d], such as ``conv4(None)``.
      num_classes: C, of the meta-training pool; with rotations four times as many.
      compare: a class's score is minus the squared distance to its nearest support
        image, or to its mean, or the cosine with its mean.
      classifier: of pre-training; "cosine" compares features and weights of length 1
        ("baseline++" of Chen et al.).
      batch_size: images of one batch; None: as many as an episode has.

    Raises:
      ValueError: at construction for an argument outside these choices; from ``init``
        for features that are not vectors.
    """
    if compare not in ("neighbour", "centroid", "cosine"):
        raise ValueError(f"compare={compare!r}: choose neighbour, centroid or cosine")

    def scores(meta_params: MetaParams, support: Batch, query_x: Array, way: int):
        features = features_of(learner, meta_params.learner, support.x)
        query = features_of(learner, meta_params.learner, query_x)
        if compare == "neighbour":
            distances = squared_distances(query, features)
            return nearest_of_class(distances, support.y, way)
        means = class_means(features, support.y, way)
        return similarities(
            query, means, "cosine" if compare == "cosine" else "euclidean"
        )

    def predict(meta_params, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        return scores(meta_params, support, query_x, num_classes)

    return make_algorithm(
        predict=predict,
        query_norm="frozen",
        **pretraining_slots(learner, num_classes, classifier, batch_size, rule=None),
    )


def fine_tuning(
    learner: Learner,
    num_classes: int,
    rule: UpdateRule | None = None,
    *,
    tune: Literal["head", "all"],
    num_steps: int = 100,
    classifier: Classifier = "linear",
    batch_size: int | None = None,
) -> MetaAlgorithm:
    """Pre-train one classifier over all classes, then train a new head on the support.

    Pre-training is that of `pretrained_features`. A linear head starts at zero, a
    cosine head at the classes' mean features; its averages of batch statistics stay
    those of pre-training while it is tuned.

    Args:
      learner, num_classes, classifier, batch_size: as in `pretrained_features`.
      rule: how to tune; None: SGD with momentum 0.9 whose ``learning_rate`` and
        ``num_steps`` (later updates are zero) are parameters of the rule, to be set
        from a grid on meta-validation without compiling again.
      tune: "head" leaves the features as they are, "all" trains the whole network. No
        default: on mini-ImageNet the published 42.1 (Chen et al., head) and 28.9 (Ravi
        & Larochelle, whole network) differ by it.
      num_steps: updates, at most.

    Raises:
      ValueError: as `pretrained_features`.
    """
    if tune not in ("head", "all"):
        raise ValueError(f"tune={tune!r}: choose head or all")
    if rule is None:
        rule = tunable(_stopping_sgd, learning_rate=0.01, num_steps=float(num_steps))

    def predict(meta_params, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        state = meta_params.learner

        def embed(body: PyTree, x: Array) -> Array:
            params = state.params | {"body": body}
            return features_of(learner, state._replace(params=params), x)

        body = state.params["body"]
        features = embed(body, support.x)
        head = _new_head(classifier, features, support.y, num_classes)
        start = head if tune == "head" else {"body": body, "head": head}

        def outputs(params: PyTree, x: Array, fixed: Array | None) -> Array:
            if tune == "head":
                return _classify(
                    classifier, params, embed(body, x) if fixed is None else fixed
                )
            return _classify(classifier, params["head"], embed(params["body"], x))

        def loss_fn(params, stats, batch, step_key):
            del batch, step_key
            return task_loss(outputs(params, support.x, features), support.y), stats

        tuned, _ = unroll(
            loss_fn,
            rule,
            meta_params.rule,
            start,
            num_steps=num_steps,
            differentiation=first_order(),
        )
        return outputs(tuned.params, query_x, None)

    return make_algorithm(
        predict=predict,
        query_norm="frozen",
        **pretraining_slots(learner, num_classes, classifier, batch_size, rule),
    )


def pretraining_slots(
    learner: Learner,
    num_classes: int,
    classifier: str,
    batch_size: int | None,
    rule: UpdateRule | None,
    loss_fn: Callable[[PyTree, Array, Array], Array] | None = None,
) -> dict[str, Any]:
    """The slots of `make_algorithm` that all pre-trained classifiers share.

    Meta-parameters: ``learner.params`` is ``{"body", "head": {"kernel" [d, C], ...}}``.
    ``loss_fn``: (head, features [N, d], labels [N]) -> loss; None: cross-entropy.
    """
    if classifier not in ("linear", "cosine"):
        raise ValueError(f"classifier={classifier!r}: choose linear or cosine")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: choose at least 2")

    def init(key: Array, episode: Episode | Batch) -> MetaParams:
        x = episode.x if isinstance(episode, Batch) else episode.support.x
        body_key, head_key, rule_key = jax.random.split(key, 3)
        body = learner.init(body_key, x[:1])
        features, _ = jax.eval_shape(
            lambda s: learner.apply(s, x[:1], norm="stored"), body
        )
        if len(features.shape) != 2:
            raise ValueError(
                f"the learner returned shape {features.shape}, but pre-training needs "
                "features [N, d]: flatten them"
            )
        width = features.shape[-1]
        kernel = jax.random.normal(head_key, (width, num_classes)) * width**-0.5
        head = {"kernel": kernel}
        if classifier == "linear":
            head["bias"] = jnp.zeros(num_classes)
        state = body._replace(params={"body": body.params, "head": head})
        own = () if rule is None else rule.init(rule_key, state.params)
        return MetaParams(state, own)

    def loss(meta_params: MetaParams, key: Array, batch: Batch):
        state = meta_params.learner
        stats, other = lax.stop_gradient((state.stats, state.other))
        body = LearnerState(state.params["body"], stats, other)
        features, after = learner.apply(body, batch.x, norm="gather", key=key)
        outputs = _classify(classifier, state.params["head"], features)
        if loss_fn is None:
            value = task_loss(outputs, batch.y)
        else:
            value = loss_fn(state.params["head"], features, batch.y)
        metrics = {"accuracy": accuracy(outputs, batch.y)}
        return value, Aux(metrics, lax.stop_gradient(after.stats))

    def train_sampler(spec: Any) -> ClassificationSpec:
        num_images = batch_size
        if num_images is None:
            num_images = spec.way * (spec.shot + spec.queries)
        return ClassificationSpec(num_images, num_classes, spec)

    slots = with_running_statistics(
        loss,
        read=lambda p: p.learner.stats,
        write=lambda p, stats: p._replace(learner=p.learner._replace(stats=stats)),
    )
    return {"init": init, "loss": loss, "train_sampler": train_sampler, **slots}


def features_of(learner: Learner, state: LearnerState, x: Array) -> Array:
    """The features [N, d] of a pre-trained body, by its stored averages."""
    norm: Norm = "stored"
    body = state._replace(params=state.params["body"])
    return learner.apply(body, x, norm=norm)[0]


def _classify(classifier: str, head: PyTree, features: Array) -> Array:
    if classifier == "linear":
        return features @ head["kernel"] + head["bias"]
    return _COSINE_SCALE * unit(features) @ unit(head["kernel"].T).T


def _new_head(classifier: str, features: Array, labels: Array, way: int) -> PyTree:
    if classifier == "cosine":
        return {"kernel": class_means(unit(features), labels, way).T}
    return {"kernel": jnp.zeros((features.shape[-1], way)), "bias": jnp.zeros(way)}


def _stopping_sgd(learning_rate: Array, num_steps: Array) -> Any:
    """SGD with momentum 0.9 whose updates are zero from step ``num_steps`` on."""
    rate = lambda step: jnp.where(step < num_steps, learning_rate, 0.0)  # noqa: E731
    return optax.sgd(rate, momentum=0.9)
