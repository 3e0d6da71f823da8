"""Sinusoids and Gaussian clusters: the published ranges, pure in the key."""

import jax
import numpy as np
import pytest

from metalstm.data.sources.synthetic import ClusterSpec, SinusoidSpec

SPECS = [SinusoidSpec(shot=5, queries=10), ClusterSpec(way=4, shot=2, queries=3, dim=3)]


def many(spec, num=2000):
    keys = jax.random.split(jax.random.key(0), num)
    return jax.jit(jax.vmap(spec.sample))(keys)


def test_sinusoids_have_the_published_ranges():
    tasks = many(SinusoidSpec(shot=5, queries=50))
    assert tasks.support.x.shape == tasks.support.y.shape == (2000, 5, 1)
    assert tasks.query.x.shape == (2000, 50, 1)
    x, y = (np.asarray(a, np.float64)[..., 0] for a in tasks.query)
    assert np.abs(x).max() <= 5
    assert x.min() < -4.9
    assert x.max() > 4.9
    # y = A cos(phase) sin(x) - A sin(phase) cos(x): two unknowns a task.
    basis = np.stack([np.sin(x), -np.cos(x)], -1)
    solved = [
        np.linalg.lstsq(b, t, rcond=None)[0] for b, t in zip(basis, y, strict=True)
    ]
    a, b = np.array(solved).T
    fitted = np.einsum("tnk,tk->tn", basis, np.stack([a, b], -1))
    np.testing.assert_allclose(fitted, y, atol=1e-4)
    amplitude, phase = np.hypot(a, b), np.arctan2(b, a)
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, np.pi)):
        assert low - 1e-3 <= values.min() < low + 0.05
        assert high - 0.05 < values.max() <= high + 1e-3
        assert abs(values.mean() - (low + high) / 2) < 0.1
    # Support and query lie on the same curve.
    x, y = (np.asarray(part, np.float64)[..., 0] for part in tasks.support)
    expected = amplitude[:, None] * np.sin(x - phase[:, None])
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_clusters_are_balanced_shuffled_and_separable_as_stated():
    spec = ClusterSpec(way=5, shot=1, queries=20)
    tasks = many(spec, 500)
    y = np.asarray(tasks.query.y)
    counts = np.stack([np.bincount(row, minlength=5) for row in y])
    assert np.all(counts == 20)
    assert len(np.unique(y[:, 0])) == 5
    # The class means of the queries stand in for the centres.
    x = np.asarray(tasks.query.x)
    centres = np.stack([(x * (y == c)[..., None]).sum(1) / 20 for c in range(5)], 1)
    distance = np.linalg.norm(x[:, :, None] - centres[:, None], axis=-1)
    accuracy = (distance.argmin(-1) == y).mean()
    assert 0.76 < accuracy < 0.86
    support = np.asarray(tasks.support.x), np.asarray(tasks.support.y)
    own = np.take_along_axis(centres, support[1][..., None], axis=1)
    assert abs((support[0] - own).std() - 1.02) < 0.05


def test_a_sinusoids_curve_goes_through_its_points():
    spec, key = SinusoidSpec(shot=4), jax.random.key(5)
    episode = spec.sample(key)
    for part in episode:
        np.testing.assert_allclose(spec.curve(key, part.x), part.y, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_sampler_protocol(spec):
    key = jax.random.key(1)
    draw = jax.jit(lambda spec, key: spec.sample(key, None), static_argnums=0)
    jitted = draw(spec, key)
    jax.tree.map(np.testing.assert_array_equal, jitted, draw(spec, key))
    eager = spec.sample(key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jitted, eager
    )
    other = draw(spec, jax.random.key(2))
    assert not np.array_equal(jitted.query.x, other.query.x)
    assert spec.regression == isinstance(spec, SinusoidSpec)
    if not spec.regression:
        assert jitted.support.y.shape == (spec.way * spec.shot,)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="shot=0: choose 1 or more"):
        SinusoidSpec(shot=0)
    with pytest.raises(ValueError, match="low first"):
        SinusoidSpec(shot=1, domain=(5.0, -5.0))
    with pytest.raises(ValueError, match="dim=0: choose 1 or more"):
        ClusterSpec(way=2, shot=1, dim=0)
