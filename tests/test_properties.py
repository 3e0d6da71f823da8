"""Properties of sampler, features and gates, on whatever hypothesis thinks of."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from metalstm import rules
from metalstm.data.episodes import EpisodeSpec, episode_key, sample_episodes
from metalstm.data.pools import ClassPool, make_pool
from metalstm.rules.features import log_sign

quick = settings(max_examples=20, deadline=None, derandomize=True)

# -- the sampler -----------------------------------------------------------------------

CLASSES, SLOTS = 5, 9
SPECS = {
    "plain": EpisodeSpec(way=3, shot=2, queries=3),
    "every class, turned": EpisodeSpec(way=5, shot=1, queries=2, rotations=True),
}


@tiny.quick_jit
def _of_steps(seed, step, first, pool):
    """Two tasks from ``first`` on, in each of two steps, as one call trains on them."""

    def one(step, _):
        tasks = first + jnp.arange(2)
        keys = jax.vmap(lambda task: episode_key(seed, "train", step, task))(tasks)
        return step + 1, {n: sample_episodes(keys, pool, s) for n, s in SPECS.items()}

    return lax.scan(one, step, None, length=2)[1]


@tiny.quick_jit
def _of_one_step(seed, step, pool):
    """Four tasks of one step, as one host draws them."""
    keys = jax.vmap(lambda task: episode_key(seed, "train", step, task))(jnp.arange(4))
    return {name: sample_episodes(keys, pool, spec) for name, spec in SPECS.items()}


@st.composite
def pools(draw) -> ClassPool:
    """Images 3x3x2 that hold their class and slot, and a corner that shows turns."""
    # of one sum: the number of images is a shape, and each shape a program
    counts = draw(st.permutations(np.linspace(5, SLOTS, CLASSES).astype(int).tolist()))
    images = np.zeros((CLASSES, SLOTS, 3, 3, 2), np.uint8)
    images[:, :, 1, 1, 0] = 1 + np.arange(CLASSES)[:, None]
    images[:, :, 1, 1, 1] = np.arange(SLOTS)
    images[:, :, 0, 0, 0] = 255
    for of_class, count in zip(images, counts, strict=True):
        of_class[count:] = 99
    return make_pool(images, np.array(counts))


seeds, steps = st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 3)


def decoded(x) -> np.ndarray:
    """[N, 3, 3, 2] -> [N, 3]: class, slot, quarter turns."""
    x = np.rint(255 * np.asarray(x)).astype(int)
    corners = np.stack([x[:, 0, 0], x[:, 2, 0], x[:, 2, 2], x[:, 0, 2]], 1)[..., 0]
    assert np.all(np.sort(corners)[:, -2:] == [0, 255]), "padding was drawn"
    return np.stack([x[:, 1, 1, 0] - 1, x[:, 1, 1, 1], corners.argmax(1)], 1)


@quick
@given(pool=pools(), seed=seeds, step=steps)
def test_every_episode_keeps_the_samplers_promises(pool, seed, step):
    for name, episodes in jax.device_get(_of_one_step(seed, step, pool)).items():
        spec = SPECS[name]
        for task in range(4):
            sides = [jax.tree.map(lambda a, t=task: a[t], side) for side in episodes]
            for side, per_class in zip(sides, (spec.shot, spec.queries), strict=True):
                assert np.bincount(side.y).tolist() == [per_class] * spec.way
            rows = np.concatenate([decoded(side.x) for side in sides])
            labels = np.concatenate([side.y for side in sides])
            # one label is one class and one turn; no class has two labels or turns
            seen = {
                (label, c, k) for label, (c, _, k) in zip(labels, rows, strict=True)
            }
            assert len(seen) == spec.way == len({c for _, c, _ in seen})
            assert len({(c, m) for c, m, _ in rows}) == len(rows), "an image came twice"
            assert np.all(rows[:, 1] < np.asarray(pool.counts)[rows[:, 0]])
            if not spec.rotations:
                assert not rows[:, 2].any()


@quick
@given(pool=pools(), seed=seeds, step=steps)
def test_an_episode_depends_on_its_place_alone(pool, seed, step):
    """Not on how many tasks a host has, nor on how many steps are in one call."""
    together = [_of_one_step(seed, step + k, pool) for k in range(2)]
    hosts = [_of_steps(seed, step, first, pool) for first in (0, 2)]
    for k in range(2):
        parts = [jax.tree.map(lambda a, k=k: a[k], host) for host in hosts]
        joined = jax.tree.map(lambda *p: np.concatenate(p), *parts)
        tiny.assert_equal(joined, jax.tree.map(np.asarray, together[k]))
    tiny.assert_equal(_of_one_step(seed, step, pool), together[0])
    places = np.asarray(together[0]["plain"].support.x).reshape(4, -1)
    assert len(np.unique(places, axis=0)) == 4


# -- features --------------------------------------------------------------------------

P = 10.0
SEAM = math.exp(-P)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_seam = st.floats(0.999 * SEAM, 1.001 * SEAM).map(np.float32)
some_floats = arrays.arrays(
    np.float32,
    64,
    elements=finite | near_seam | near_seam.map(np.negative),
    fill=st.nothing(),
)


@tiny.quick_jit
def _features(x):
    """Magnitude and sign [64], and both their derivatives by x."""
    slopes = [jax.grad(lambda x, i=i: log_sign(x, P)[i].sum())(x) for i in (0, 1)]
    return *log_sign(x, P), *slopes


@quick
@given(x=some_floats)
def test_features_are_finite_odd_and_even_and_true_to_the_paper(x):
    magnitude, sign, *slopes = map(np.asarray, _features(x))
    for found in (magnitude, sign, *slopes):
        assert np.all(np.isfinite(found))
    mirrored = [np.asarray(a) for a in _features(-x)]
    np.testing.assert_array_equal(mirrored[0], magnitude)
    np.testing.assert_array_equal(mirrored[1], -sign)
    assert np.all(np.abs(sign) <= 1 + 1e-6)
    assert np.all(magnitude >= -1 - 1e-6)
    # whichever side of the seam x is on: they meet there
    exact, size = x.astype(np.float64), np.abs(x.astype(np.float64))
    clipped = np.maximum(size, SEAM)
    np.testing.assert_allclose(magnitude, np.log(clipped) / P, atol=2e-6)
    np.testing.assert_allclose(sign, np.clip(exact / SEAM, -1, 1), atol=2e-6)
    larger = np.sign(exact) == np.sign(sign)
    assert np.all(larger | (size < 1e-36)), "a gradient's sign is lost"


@pytest.mark.parametrize(
    "special",
    [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, SEAM, -SEAM],
)
def test_features_and_their_derivatives_at_the_edges(special):
    for found in _features(np.full(64, special, np.float32)):
        assert np.all(np.isfinite(found))
    below, above = (np.float32(SEAM) * np.float32(1 + s) for s in (-1e-6, 1e-6))
    x = np.resize([below, above], 64).astype(np.float32)
    magnitude, sign = (np.asarray(a) for a in _features(x)[:2])
    assert np.ptp(magnitude) < 1e-5
    assert np.ptp(sign) < 1e-5


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows_in_the_features(special):
    """A step that is not finite is left out: nothing here may hide it."""
    features = [np.asarray(a) for a in _features(np.full(64, special, np.float32))[:2]]
    assert not np.isfinite(np.stack(features)).all(0).any()


# -- gates -----------------------------------------------------------------------------

GATES = rules.lstm_gates(
    hidden_size=0, loss_input=False, theta_input=False, carry_input=False
)


@tiny.quick_jit
def _gated(forget_bias, input_bias, theta, gradient):
    no_features = jnp.zeros(2)
    rule = {
        "forget": {"bias": forget_bias, "features": no_features},
        "input": {"bias": input_bias, "features": no_features},
    }
    tx = GATES.bind(rule)
    return tx.update(gradient, tx.init(theta), theta)[0]


moderate = arrays.arrays(
    np.float32, 8, elements=st.floats(-100, 100, width=32), fill=st.nothing()
)


@quick
@given(
    forget=st.floats(-30, 80, width=32),
    input_=st.floats(-30, 30, width=32),
    theta=moderate,
    gradient=moderate,
)
def test_an_update_keeps_its_digits_however_near_f_is_to_1(
    forget, input_, theta, gradient
):
    """(f - 1) theta - i g: from f itself nothing would be left beyond a logit of 17."""
    delta = np.asarray(_gated(forget, input_, theta, gradient), np.float64)
    pull = -theta.astype(np.float64) / (1 + np.exp(np.float64(forget)))
    push = -gradient.astype(np.float64) / (1 + np.exp(-np.float64(input_)))
    assert np.all(
        np.abs(delta - (pull + push)) <= 4e-6 * (abs(pull) + abs(push)) + 1e-30
    )
    alone = np.asarray(_gated(forget, input_, theta, np.zeros(8, np.float32)))
    np.testing.assert_allclose(alone, pull, rtol=4e-6, atol=1e-30)
