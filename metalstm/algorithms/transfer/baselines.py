"""Transfer baselines: pre-train one classifier, then compare or fine-tune its features.

What meta-learning must beat (Ravi & Larochelle, 2017; Chen et al., 2019, "A Closer Look
at Few-shot Classification"). Shapes: N images, M queries, C classes of meta-training,
d features, way classes of a task.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.algorithms.common import task_loss
from metalstm.algorithms.metric.feature_heads import HEADS
from metalstm.algorithms.transfer.engine import (
    Classifier,
    classify,
    features_of,
    init_task_head,
    pretrain,
)
from metalstm.base import (
    Array,
    Batch,
    Learner,
    LearnerState,
    MetaAlgorithm,
    PyTree,
    UpdateRule,
)
from metalstm.checks import check_choice
from metalstm.inner import first_order, unroll
from metalstm.records import recorded
from metalstm.rules import as_rule, tunable

__all__ = ["fine_tuning", "pretrained_features"]


@recorded("algorithm")
def pretrained_features(
    learner: Learner,
    num_classes: int,
    *,
    compare: Literal[
        "neighbour", "centroid", "cosine", "ridge", "logistic"
    ] = "centroid",
    classifier: Classifier = "linear",
    batch_size: int | None = None,
    per_class: int | None = None,
    centroid_weight: float = 0.0,
) -> MetaAlgorithm:
    """Pre-train one classifier over all classes, then compare its features.

    Meta-training draws batches of labelled images (`train_sampler`) and learns the
    features and a head of C classes by cross-entropy; meta-test ignores the head.
    Batch norm uses averages over pre-training (``query_norm="frozen"``).

    Args:
      learner: returns features [N, d], such as ``conv4(None)``.
      num_classes: C, of the meta-training pool; with rotations four times as many.
      compare: a class's score is minus the squared distance to its nearest support
        image, or to its mean, or the cosine with its mean; or that of ridge or
        logistic regression with a penalty of 1 on features of length 1.
      classifier: of pre-training; "cosine" compares features and weights of length 1
        ("baseline++" of Chen et al.).
      batch_size: images of one batch; None: as many as an episode has.
      per_class: images of each class in a batch; None: all are drawn independently.
      centroid_weight: of a prototypical loss within the batch that is added to the
        classifier's (`centroid_loss`): features learn to be compared.

    Raises:
      ValueError: at construction for an argument outside these choices; from ``init``
        for features that are not vectors.
    """
    check_choice("compare", compare, HEADS)

    def predict(meta_params, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        features = features_of(learner, meta_params.learner, support.x)
        query = features_of(learner, meta_params.learner, query_x)
        return HEADS[compare](features, support.y, query, num_classes)

    return pretrain(
        learner,
        num_classes,
        predict,
        classifier=classifier,
        batch_size=batch_size,
        per_class=per_class,
        centroid_weight=centroid_weight,
    )


@recorded("algorithm")
def fine_tuning(
    learner: Learner,
    num_classes: int,
    rule: UpdateRule | optax.GradientTransformation | None = None,
    *,
    tune: Literal["head", "all"],
    num_steps: int = 100,
    classifier: Classifier = "linear",
    batch_size: int | None = None,
    per_class: int | None = None,
    centroid_weight: float = 0.0,
) -> MetaAlgorithm:
    """Pre-train one classifier over all classes, then train a new head on the support.

    Pre-training is that of `pretrained_features`. A linear head starts at zero, a
    cosine head at the classes' mean features. Tuning normalises by the averages of
    pre-training.

    Args:
      learner, num_classes, classifier, batch_size, per_class, centroid_weight: as in
        `pretrained_features`.
      rule: how to tune, an `UpdateRule` or any optax transform; None: SGD with momentum
        0.9 whose ``learning_rate`` and ``num_steps`` (later updates are zero) are
        parameters of the rule, to be set from a grid on meta-validation without
        compiling again.
      tune: "head" leaves the features as they are, "all" trains the body too. No
        default: on mini-ImageNet the published 42.1 (Chen et al., head) and 28.9 (Ravi
        & Larochelle, all) differ by it.
      num_steps: updates, at most.

    Raises:
      ValueError: as `pretrained_features`.
    """
    check_choice("tune", tune, ("head", "all"))
    stops = rule is None
    if rule is None:
        rule = tunable(_stopping_sgd, learning_rate=0.01, num_steps=float(num_steps))
    rule = as_rule(rule)

    def predict(meta_params, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        state = meta_params.learner
        features = features_of(learner, state, support.x)
        head = init_task_head(classifier, features, support.y, num_classes)
        start = head if tune == "head" else {"body": state.params["body"], "head": head}

        def loss(params):
            if tune == "head":  # its features stay what they are
                outputs = classify(classifier, params, features)
            else:
                outputs = _outputs(learner, state, classifier, params, support.x)
            return task_loss(outputs, support.y)

        def loss_fn(params, stats, step, step_key):
            del step_key
            if not stops:
                return loss(params), stats
            # updates that would be zero cost nothing
            zero = jnp.zeros((), jax.eval_shape(loss, params).dtype)
            continues = step.astype(jnp.float32) < meta_params.rule["num_steps"]
            return lax.cond(continues, loss, lambda _: zero, params), stats

        tuned, _ = unroll(
            loss_fn,
            rule,
            meta_params.rule,
            start,
            jnp.arange(num_steps),
            num_steps=num_steps,
            differentiation=first_order(),
        )
        network = tuned.params
        if tune == "head":
            network = {"body": state.params["body"], "head": tuned.params}
        return _outputs(learner, state, classifier, network, query_x)

    return pretrain(
        learner,
        num_classes,
        predict,
        classifier=classifier,
        batch_size=batch_size,
        per_class=per_class,
        centroid_weight=centroid_weight,
        rule=rule,
    )


def _outputs(
    learner: Learner,
    state: LearnerState,
    classifier: Classifier,
    network: PyTree,
    x: Array,
) -> Array:
    """Return the logits [N, way] of ``network``, a body and a head."""
    features = features_of(learner, state._replace(params=network), x)
    return classify(classifier, network["head"], features)


def _stopping_sgd(learning_rate: Array, num_steps: Array) -> Any:
    """SGD with momentum 0.9 whose updates are zero from step ``num_steps`` on."""

    def rate(step: Array) -> Array:
        continues = step.astype(jnp.float32) < num_steps
        return jnp.where(continues, learning_rate, 0.0)

    return optax.sgd(rate, momentum=0.9)
