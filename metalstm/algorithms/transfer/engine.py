"""One engine for methods that pre-train a classifier over all meta-train classes.

Shapes: N images, C classes of meta-training, d features, way classes of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.algorithms.common import (
    accuracy,
    make_algorithm,
    stop_statistics,
    task_loss,
    with_running_statistics,
)
from metalstm.algorithms.metric.distances import class_means, unit
from metalstm.base import (
    Array,
    Aux,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    PyTree,
    UpdateRule,
)
from metalstm.batches import first_example, to_rank_of
from metalstm.checks import check_at_least, check_choice, check_features
from metalstm.data.classification import ClassificationSpec
from metalstm.nn.heads import output_shape
from metalstm.runtime.products import precise_matmul

__all__ = [
    "Classifier",
    "centroid_loss",
    "classify",
    "features_of",
    "init_task_head",
    "pretrain",
]

Classifier = Literal["linear", "cosine"]
_COSINE_SCALE = 10.0  # cosines alone are too flat for a softmax


def pretrain(
    learner: Learner,
    num_classes: int,
    predict: Callable[..., Array],
    *,
    classifier: Classifier = "linear",
    batch_size: int | None = None,
    rule: UpdateRule | None = None,
    loss_fn: Callable[[PyTree, Array, Array], Array] | None = None,
    per_class: int | None = None,
    centroid_weight: float = 0.0,
) -> MetaAlgorithm:
    """Train features and a head of C classes on batches of labelled images.

    Meta-parameters: ``learner.params`` is ``{"body", "head": {"kernel" [d, C], ...}}``.
    Batch norm uses averages over pre-training (``query_norm="frozen"``).

    Args:
      predict: of `MetaAlgorithm`; it reads the features by `features_of`.
      classifier: the head; "cosine" has no bias.
      batch_size: images of one batch; None: as many as an episode has.
      rule: whose parameters are part of the meta-parameters, and not learned here.
      loss_fn: (head, features [N, d], labels [N]) -> loss; None: cross-entropy.
      per_class: images of each class in a batch; None: all are drawn independently.
      centroid_weight: of `centroid_loss`, which is added.

    Raises:
      ValueError: at construction for another classifier, fewer than two classes, or a
        centroid loss without two images a class; from ``init`` for features that are
        not vectors.
    """
    check_choice("classifier", classifier, get_args(Classifier))
    check_at_least("num_classes", num_classes, 2)
    check_at_least("centroid_weight", centroid_weight, 0)
    if centroid_weight and (per_class is None or per_class < 2):
        raise ValueError(
            f"centroid_weight={centroid_weight} with per_class={per_class}: an image "
            "is compared with others of its class; choose per_class=2 or more"
        )

    def init(key: Array, episode: Episode | Batch) -> MetaParams:
        batch = episode if isinstance(episode, Batch) else episode.support
        x = first_example(batch.x)
        body_key, head_key, rule_key = jax.random.split(key, 3)
        body = learner.init(body_key, x)
        features = output_shape(learner, body, x)
        check_features(features.shape, "pre-training")
        width = features.shape[-1]
        shape = (width, num_classes)
        kernel = jax.random.normal(head_key, shape, features.dtype) * width**-0.5
        head = {"kernel": kernel}
        if classifier == "linear":
            head["bias"] = jnp.zeros(num_classes, features.dtype)
        state = body._replace(params={"body": body.params, "head": head})
        rule_params = () if rule is None else rule.init(rule_key, state.params)
        return MetaParams(state, rule_params)

    def loss(meta_params: MetaParams, key: Array, batch: Batch):
        params, stats, other = stop_statistics(meta_params.learner)
        body = LearnerState(params["body"], stats, other)
        features, after = learner.apply(body, batch.x, norm="gather", key=key)
        outputs = classify(classifier, params["head"], features)
        if loss_fn is None:
            value = task_loss(outputs, batch.y)
        else:
            value = loss_fn(params["head"], features, batch.y)
        if centroid_weight:
            value += centroid_weight * centroid_loss(features, batch.y, num_classes)
        metrics = {"accuracy": accuracy(outputs, batch.y)}
        return value, Aux(metrics, lax.stop_gradient(after.stats))

    def train_sampler(spec: Any) -> ClassificationSpec:
        num_images = batch_size
        if num_images is None:
            num_images = spec.way * (spec.shot + spec.queries)
        return ClassificationSpec(num_images, num_classes, spec, per_class)

    slots: dict[str, Any] = with_running_statistics(
        loss,
        read=lambda p: p.learner.stats,
        write=lambda p, stats: p._replace(learner=p.learner._replace(stats=stats)),
    )
    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        train_sampler=train_sampler,
        query_norm="frozen",
        **slots,
    )


def centroid_loss(features: Array, labels: Array, num_classes: int) -> Array:
    r"""Cross-entropy of each image against the class means of the other images.

    .. math::
        \ell_i = -\log
            \frac{e^{10 a_i}}{e^{10 a_i} + \sum_{c \ne y_i} e^{10 \cos(u_i, s_c)}},
        \quad a_i = \cos(u_i, s_{y_i} - u_i)

    with features :math:`u_i` of length 1 and their sums :math:`s_c` over the batch's
    images of class c: a prototypical network's loss by cosine in which every image is
    query and support in turn. Images alone in their class do not count.

    Args:
      features: [N, d].
      labels: [N], of ``num_classes`` classes, of which the batch may have a part.
    """
    u = unit(features)
    of_class = jax.nn.one_hot(labels, num_classes, dtype=u.dtype)
    sums = precise_matmul(of_class.T, u)
    others = jnp.sum(u * unit(sums[labels] - u), -1, keepdims=True)
    cosines = jnp.where(of_class > 0, others, precise_matmul(u, unit(sums).T))
    counts = of_class.sum(0)
    logits = jnp.where(counts > 0, _COSINE_SCALE * cosines, -jnp.inf)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    accompanied = counts[labels] > 1
    return jnp.sum(losses, where=accompanied) / jnp.maximum(
        accompanied.sum(dtype=u.dtype), 1
    )


def features_of(learner: Learner, state: LearnerState, x: Array) -> Array:
    """Return the features [N, d] of a pre-trained body, by its stored averages."""
    body = state._replace(params=state.params["body"])
    return learner.apply(body, x, norm="stored")[0]


def classify(classifier: Classifier, head: PyTree, features: Array) -> Array:
    """Return the logits of features [N, d], one column for each class of ``head``."""
    if classifier == "linear":
        outputs = features @ head["kernel"]
        return outputs + to_rank_of(head["bias"], outputs)
    return _COSINE_SCALE * unit(features) @ unit(head["kernel"].T).T


def init_task_head(
    classifier: Classifier, features: Array, labels: Array, way: int
) -> PyTree:
    """Start a head for a task: linear at zero, cosine at the classes' mean features."""
    if classifier == "cosine":
        return {"kernel": class_means(unit(features), labels, way).T}
    zeros = lambda *shape: jnp.zeros(shape, features.dtype)  # noqa: E731
    return {"kernel": zeros(features.shape[-1], way), "bias": zeros(way)}
