"""Margin losses: classify all meta-train classes by angle, and by a margin.

Shapes: N images, C classes of meta-training, d features.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from metalstm.algorithms.common import task_loss
from metalstm.algorithms.metric.distances import class_means, similarities, unit
from metalstm.algorithms.transfer.engine import features_of, pretrain
from metalstm.base import Array, Batch, Learner, MetaAlgorithm
from metalstm.checks import check_choice, check_positive
from metalstm.records import recorded

__all__ = ["MarginLoss", "margin_classifier", "margin_logits"]

MarginLoss = Literal["am_softmax", "arcface", "sphereface"]

_PUBLISHED: dict[str, tuple[float, float | None]] = {  # margin, scale
    "am_softmax": (0.35, 30.0),
    "arcface": (0.5, 64.0),
    "sphereface": (4, None),
}
_SPHEREFACE_BLEND = 5.0  # lambda, where the authors' annealing ends
_EDGE = 1e-6  # cosines keep this far from 1, where an angle has no derivative


@recorded("algorithm")
def margin_classifier(
    learner: Learner,
    num_classes: int,
    *,
    loss: MarginLoss,
    margin: float | None = None,
    scale: float | None = None,
    batch_size: int | None = None,
) -> MetaAlgorithm:
    """Pre-train an embedding by a margin between classes; compare it by cosine.

    Meta-training is that of `pretrained_features`, with the loss of `margin_logits`.
    At meta-test a class scores the cosine of the query and the mean of its support
    images' embeddings, each of length 1. `metalstm.verification.verify` takes
    `embedding_state` of the meta-parameters.

    Args:
      learner: returns features [N, d]; give them a sign (``final_relu=False`` for
        `metalstm.nn.conv4`), or all angles are acute.
      num_classes: C, of the meta-training pool; with rotations four times as many.
      loss: "am_softmax", "arcface" or "sphereface".
      margin, scale: see `margin_logits`; None: as published.
      batch_size: images of one batch; None: as many as an episode has.

    Raises:
      ValueError: at construction for an argument outside these choices; from ``init``
        for features that are not vectors.
    """
    check_choice("loss", loss, get_args(MarginLoss))
    published_margin, published_scale = _PUBLISHED[loss]
    chosen_margin = published_margin if margin is None else margin
    chosen_scale = published_scale if scale is None else scale
    _check_margin(loss, chosen_margin)
    if chosen_scale is not None:
        check_positive("scale", chosen_scale)

    def loss_fn(head, features: Array, labels: Array) -> Array:
        weights = head["kernel"].T
        logits = margin_logits(
            features,
            weights,
            labels,
            loss=loss,
            margin=chosen_margin,
            scale=chosen_scale,
        )
        return task_loss(logits, labels)

    def predict(meta_params, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        support_features = features_of(learner, meta_params.learner, support.x)
        query = features_of(learner, meta_params.learner, query_x)
        means = class_means(unit(support_features), support.y, num_classes)
        return similarities(query, means, "cosine")

    return pretrain(
        learner,
        num_classes,
        predict,
        classifier="cosine",
        batch_size=batch_size,
        loss_fn=loss_fn,
    )


def margin_logits(
    features: Array,
    weights: Array,
    labels: Array,
    *,
    loss: MarginLoss,
    margin: float,
    scale: float | None,
) -> Array:
    """Return logits [N, C] of features [N, d] and class weights [C, d].

    theta_j is the angle between the features and the weights of class j. Every logit
    is scale * cos(theta_j), and for the label y the cosine is replaced by

    - "am_softmax" (Wang et al., 2018, equation 6): cos(theta_y) - margin, published
      with margin 0.35 and scale 30;
    - "arcface" (Deng et al., 2019, equation 3): cos(theta_y + margin), published with
      0.5 and 64; beyond theta_y = pi - margin, where it would rise again, the tangent
      there continues: cos(theta_y) - margin * sin(margin);
    - "sphereface" (Liu et al., 2017, equation 7): psi(theta_y) = (-1)^k cos(margin *
      theta_y) - 2 k, with k = floor(margin * theta_y / pi), published with 4. As in
      the authors' code it is blended, (5 cos(theta_y) + psi(theta_y)) / 6.

    ``scale=None`` is the length of each feature vector, published for "sphereface",
    whose authors start nearly without a margin; from the start it lets features shrink
    instead of turn (glyphs, 500 batches: 26% at 5-way 1-shot, and 67% with scale=30).
    """
    cosines = unit(features) @ unit(weights).T
    cosine = jnp.take_along_axis(cosines, labels[:, None], 1)[:, 0]
    cosine = jnp.clip(cosine, -1 + _EDGE, 1 - _EDGE)
    if loss == "am_softmax":
        target = cosine - margin
    elif loss == "arcface":
        sine = jnp.sqrt(1 - cosine * cosine)
        turned = cosine * math.cos(margin) - sine * math.sin(margin)
        beyond = cosine - margin * math.sin(margin)
        target = jnp.where(cosine > -math.cos(margin), turned, beyond)
    else:
        angle = margin * jnp.arccos(cosine)
        k = jnp.floor(angle / jnp.pi)
        psi = jnp.where(k % 2 == 0, 1.0, -1.0) * jnp.cos(angle) - 2 * k
        target = (_SPHEREFACE_BLEND * cosine + psi) / (1 + _SPHEREFACE_BLEND)
    is_label = jax.nn.one_hot(labels, weights.shape[0], dtype=bool)
    logits = jnp.where(is_label, target[:, None], cosines)
    if scale is not None:
        return scale * logits
    return jnp.sqrt(jnp.square(features).sum(-1, keepdims=True) + _EDGE) * logits


def _check_margin(loss: str, margin: float) -> None:
    fits = {
        "am_softmax": (margin >= 0, "0 or more"),
        "arcface": (0 <= margin < math.pi / 2, "an angle in [0, pi / 2)"),
        "sphereface": (margin >= 1 and margin == int(margin), "an integer, 1 or more"),
    }
    valid, choose = fits[loss]
    if not valid:
        raise ValueError(f"margin={margin} for {loss}: choose {choose}")
