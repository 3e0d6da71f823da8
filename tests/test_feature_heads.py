"""Heads on frozen features, against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from metalstm import algorithms, data
from metalstm.base import Batch

RNG = np.random.default_rng(3)
WAY, SHOT, FEATURES = 3, 4, 6
LABELS = RNG.permutation(np.repeat(np.arange(WAY), SHOT))
X = RNG.normal(size=(WAY * SHOT, FEATURES)) + np.eye(FEATURES)[LABELS]
QUERY = RNG.normal(size=(7, FEATURES))
MEAN = RNG.normal(size=FEATURES)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def scores(algorithm, mean=(), x=X, query=QUERY) -> np.ndarray:
    mean = () if isinstance(mean, tuple) else jnp.asarray(mean, jnp.float32)
    x, query = (jnp.asarray(a, jnp.float32) for a in (x, query))
    support = Batch(x, jnp.asarray(LABELS, jnp.int32))
    predict = tiny.quick_jit(
        lambda mean, support, query: algorithm.predict(
            mean, jax.random.key(0), support, query, num_classes=WAY
        )
    )
    return np.asarray(predict(mean, support, query))


def centroid(x, query):
    means = [x[k == LABELS].mean(0) for k in range(WAY)]
    return np.array([[-np.sum((q - c) ** 2) for c in means] for q in query])


def ridge_by_normal_equations(x, query, penalty):
    onehot = np.eye(WAY)[LABELS]
    gram = x.T @ x + penalty * np.eye(x.shape[1])
    return query @ np.linalg.solve(gram, x.T @ onehot)


def logistic_by_newton(x, query, penalty):
    """The whole Hessian of the weights [d + 1, way], in float64."""
    x, query = (np.pad(a, ((0, 0), (0, 1)), constant_values=1) for a in (x, query))
    width, onehot = x.shape[1], np.eye(WAY)[LABELS]
    weights = np.zeros((width, WAY))
    for _ in range(50):
        p = np.exp(x @ weights)
        p /= p.sum(-1, keepdims=True)
        gradient = x.T @ (p - onehot) + penalty * weights
        hessian = penalty * np.eye(width * WAY)
        for row, of_row in zip(x, p, strict=True):
            curvature = np.diag(of_row) - np.outer(of_row, of_row)
            hessian += np.kron(np.outer(row, row), curvature)
        step = np.linalg.solve(hessian, gradient.ravel()).reshape(width, WAY)
        weights -= step
    assert np.abs(step).max() < 1e-12
    return query @ weights


@pytest.mark.parametrize(
    ("algorithm", "reference"),
    [
        (algorithms.nearest_centroid(), centroid),
        (algorithms.ridge(penalty=0.3),
         lambda x, q: ridge_by_normal_equations(x, q, 0.3)),
        (algorithms.logistic_regression(penalty=0.02),
         lambda x, q: logistic_by_newton(x, q, 0.02)),
    ],
    ids=["centroid", "ridge", "logistic"],
)  # fmt: skip
def test_heads_are_their_equations_on_centred_features_of_length_1(
    algorithm, reference
):
    expected = reference(unit(X - MEAN), unit(QUERY - MEAN))
    np.testing.assert_allclose(scores(algorithm, MEAN), expected, rtol=1e-3, atol=1e-3)


def test_heads_take_features_as_they_are_too():
    raw = algorithms.nearest_centroid(unit_length=False)
    np.testing.assert_allclose(scores(raw), centroid(X, QUERY), rtol=1e-5)
    # more features than examples: one system of N equations
    wide, queries = RNG.normal(size=(12, 40)), RNG.normal(size=(5, 40))
    expected = ridge_by_normal_equations(wide, queries, 2.0)
    found = scores(algorithms.ridge(penalty=2.0, unit_length=False), (), wide, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_nearest_neighbours_vote_and_the_nearer_decides_a_tie():
    found = scores(algorithms.nearest_neighbour(num_neighbours=4))
    for row, q in zip(found, QUERY, strict=True):
        nearest = LABELS[np.argsort(((X - q) ** 2).sum(-1))[:4]]
        votes = [int((nearest == k).sum()) for k in range(WAY)]
        np.testing.assert_array_equal(np.floor(row), votes)
        first = {k: list(nearest).index(k) for k in set(nearest)}
        best = max(first, key=lambda k: (votes[k], -first[k]))
        assert row.argmax() == best
    with pytest.raises(ValueError, match="num_neighbours=13 of 12 support examples"):
        scores(algorithms.nearest_neighbour(num_neighbours=13))


def test_logistic_regression_that_has_not_converged_says_nan():
    hopeless = algorithms.logistic_regression(penalty=1e-9, unit_length=False)
    assert np.isnan(scores(hopeless)).all()


def test_the_base_mean_is_that_of_the_examples_without_padding():
    ragged = [RNG.integers(0, 255, (n, 2, 2, 1), np.uint8) for n in (3, 5)]
    expected = np.concatenate(ragged).reshape(8, -1).mean(0) / 255
    found = algorithms.base_mean(data.make_pool(ragged))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    floats = [of_class.astype(np.float32) for of_class in ragged]
    found = algorithms.base_mean(data.make_pool(floats))
    np.testing.assert_allclose(found, 255 * expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"mean to subtract has shape \(4,\)"):
        scores(algorithms.ridge(), np.zeros(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: algorithms.ridge(penalty=0), "penalty=0: choose a number above 0"),
        (lambda: algorithms.logistic_regression(penalty=-1), "penalty=-1: choose"),
        (lambda: algorithms.nearest_neighbour(num_neighbours=0), "num_neighbours=0"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
