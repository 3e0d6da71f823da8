"""Margin losses against their equations in numpy, and what they must have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_metric as reference
import tiny
from test_algorithms import EPISODE, KEY, meta_params

from metalstm import algorithms
from metalstm.algorithms.transfer.margins import margin_logits
from metalstm.base import Learner, LearnerState

IDENTITY = Learner(
    lambda key, x: LearnerState({}, {}, {}),
    lambda state, x, *, norm, key=None: (x, state),
)
PUBLISHED = [
    ("am_softmax", 0.35, 30.0),
    ("arcface", 0.5, 64.0),
    ("sphereface", 4, None),
]


def around_the_circle(num: int = 24):
    """Features at every angle to the weights of class 0, lengths from 1 to 3."""
    angles = np.linspace(0.01, 2 * np.pi - 0.02, num)
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    lengths = np.linspace(1, 3, num)[:, None]
    weights = np.array([[2.0, 0.0], [-0.3, 0.5], [0.1, -0.7]])
    return features * lengths, weights, np.zeros(num, int)


@pytest.mark.parametrize(
    ("loss", "margin", "scale"), [*PUBLISHED, ("sphereface", 3, 8.0)]
)
def test_margin_logits_are_the_papers(loss, margin, scale):
    features, weights, labels = around_the_circle()
    labels[::5] = 2
    found = margin_logits(
        *map(jnp.asarray, (features, weights, labels)),
        loss=loss,
        margin=margin,
        scale=scale,
    )
    expected = reference.margin_logits(features, weights, labels, loss, margin, scale)
    # the smallest angles meet the edge where cosines are cut
    np.testing.assert_allclose(found, expected, atol=2e-4 * (scale or 3))


@pytest.mark.parametrize(("loss", "margin", "scale"), PUBLISHED)
def test_the_published_margins_and_scales_are_the_defaults(loss, margin, scale):
    algorithm = algorithms.margin_classifier(IDENTITY, tiny.WAY, loss=loss)
    params = algorithm.init(KEY, EPISODE)
    batch = EPISODE.query
    weights = np.asarray(params.learner.params["head"]["kernel"], np.float64).T
    labels = np.asarray(batch.y)
    logits = reference.margin_logits(
        np.asarray(batch.x, np.float64), weights, labels, loss, margin, scale
    )
    shares = [reference.softmax(row)[y] for row, y in zip(logits, labels, strict=True)]
    value, aux = algorithm.loss(params, KEY, batch)
    np.testing.assert_allclose(value, -np.mean(np.log(shares)), rtol=1e-4)
    plain = np.array([[reference.cosine(x, w) for w in weights] for x in batch.x])
    assert aux.metrics["accuracy"] == pytest.approx((plain.argmax(1) == labels).mean())


@pytest.mark.parametrize(("loss", "margin", "scale"), PUBLISHED)
def test_the_labels_logit_falls_with_its_angle_and_is_below_the_cosine(
    loss, margin, scale
):
    angles = jnp.linspace(0.0, jnp.pi, 301)
    features = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
    weights, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(301, int)

    def own(features):
        options = {"loss": loss, "margin": margin, "scale": scale}
        return margin_logits(features, weights, labels, **options)[:, 0]

    logits = np.asarray(own(features))
    assert np.all(np.diff(logits) < 1e-4)
    below = (1.0 if scale is None else scale) * np.cos(angles) - logits
    assert np.all(below[1:] > -1e-4)
    assert below[150] > 0.01
    slopes = jax.grad(lambda f: own(f).sum())(features)
    assert np.all(np.isfinite(slopes))


def test_no_margin_is_a_softmax_of_cosines():
    features, weights, labels = map(jnp.asarray, around_the_circle())
    first, second, third = (
        margin_logits(features, weights, labels, loss=loss, margin=margin, scale=5.0)
        for loss, margin in (("am_softmax", 0.0), ("arcface", 0.0), ("sphereface", 1))
    )
    np.testing.assert_allclose(second, first, atol=1e-5)
    np.testing.assert_allclose(third, first, atol=1e-5)


def test_classes_are_compared_by_the_cosine_of_mean_directions():
    algorithm = algorithms.margin_classifier(IDENTITY, tiny.WAY, loss="arcface")
    support, query = EPISODE
    params = algorithm.init(KEY, EPISODE)
    x = np.asarray(support.x, np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = reference.prototypical(
        x, np.asarray(support.y), np.asarray(query.x), tiny.WAY, "cosine", 1.0
    )
    found = algorithm.predict(params, KEY, support, query.x, num_classes=tiny.WAY)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_embedding_of_a_classifier_is_its_body():
    params = meta_params("margin_classifier")
    state = algorithms.embedding_state(params)
    tiny.assert_equal(state.params, params.learner.params["body"])
    tiny.assert_equal(state.stats, params.learner.stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"loss='hinge': choose one of am_softmax, arcface, sph"),
        ({"loss": "am_softmax", "margin": -1}, r"margin=-1 for am_softmax: choose 0"),
        ({"loss": "arcface", "margin": 2}, r"margin=2 for arcface: choose an angle"),
        ({"loss": "sphereface", "margin": 1.5}, r"margin=1.5 for sphereface: choose"),
        ({"loss": "arcface", "scale": 0}, r"scale=0: choose a number above 0"),
    ],
)
def test_wrong_margins_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        algorithms.margin_classifier(IDENTITY, 3, **options)
