"""Verification: the curve, its summaries, the pairs, and embeddings of any arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from metalstm import algorithms, verification
from metalstm.base import Learner, LearnerState
from metalstm.data.pools import make_pool

IDENTITY = Learner(
    lambda key, x: LearnerState({}, {}, {}),
    lambda state, x, *, norm, key=None: (x, state),
)
curve = verification.receiver_operating_characteristic


def test_the_curve_by_hand():
    #                 same  other same  other, other   same
    found = curve(
        [0.9, 0.8, 0.7, 0.5, 0.5, 0.1], [True, False, True, False, False, True]
    )
    np.testing.assert_array_equal(found.thresholds, [np.inf, 0.9, 0.8, 0.7, 0.5, 0.1])
    np.testing.assert_allclose(found.true_accepts, np.array([0, 1, 1, 2, 2, 3]) / 3)
    np.testing.assert_allclose(found.false_accepts, np.array([0, 0, 1, 1, 3, 3]) / 3)
    # at 0.7 a third of either kind is wrong
    assert found.equal_error_rate == pytest.approx(1 / 3)
    assert found.true_accepts_at(1 / 3) == pytest.approx(2 / 3)
    # pairs of (same, other) that are ranked rightly: 3 + 2 + 0 of 9
    assert found.area == pytest.approx(5 / 9)


def test_the_curve_counts_what_a_threshold_accepts():
    rng = np.random.default_rng(0)
    same = rng.random(300) < 0.4
    scores = np.round(rng.normal(size=300) + same, 1)  # with ties
    found = curve(scores, same)
    for threshold, false, true in zip(*found[:3], strict=True):
        accepted = scores >= threshold
        assert false == pytest.approx(accepted[~same].mean())
        assert true == pytest.approx(accepted[same].mean())
    ahead = scores[same][:, None] - scores[~same][None]
    assert found.area == pytest.approx((ahead > 0).mean() + (ahead == 0).mean() / 2)


def test_two_gaussians_have_the_error_rate_of_the_textbook():
    rng = np.random.default_rng(1)
    same = np.repeat([True, False], 100_000)
    found = curve(rng.normal(size=200_000) + 2 * same, same)
    assert found.equal_error_rate == pytest.approx(0.1587, abs=0.003)  # Phi(-1)
    # Phi(2 - 2.3263)
    assert found.true_accepts_at(0.01) == pytest.approx(0.3721, abs=0.01)


def test_perfect_scores_make_no_error():
    found = curve([2.0, 1.0], [True, False])
    assert found.equal_error_rate == 0
    assert found.area == 1
    assert found.true_accepts_at(1.0) == 1


def test_pairs_are_what_they_say_and_reach_everything():
    labels = np.array(["c", "a", "b", "a", "c", "b", "a", "alone"])
    pairs = verification.draw_pairs(labels, 4001, seed=3)
    assert len(pairs.same) == 4000
    assert pairs.same.sum() == 2000
    np.testing.assert_array_equal(
        labels[pairs.first] == labels[pairs.second], pairs.same
    )
    assert np.all(pairs.first != pairs.second)
    drawn = {(*sorted(p),) for p in zip(pairs.first, pairs.second, strict=True)}
    assert len(drawn) == 8 * 7 // 2
    again = verification.draw_pairs(labels, 4001, seed=3)
    np.testing.assert_array_equal(again.second, pairs.second)
    other = verification.draw_pairs(labels, 4001, seed=4)
    assert np.any(other.second != pairs.second)


def test_identities_apart_are_verified_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 30
    centres = rng.normal(size=(30, 8))
    noise = rng.normal(size=(300, 8))
    for similarity in ("cosine", "euclidean"):
        options = {"similarity": similarity, "num_pairs": 2000, "batch_size": 128}
        state = LearnerState({}, {}, {})
        apart = verification.verify(
            IDENTITY, state, centres[labels] + 0.1 * noise, labels, **options
        )
        assert apart.equal_error_rate < 0.02
        assert apart.true_accepts_at(0.01) > 0.9
        chance = verification.verify(IDENTITY, state, noise, labels, **options)
        assert chance.equal_error_rate == pytest.approx(0.5, abs=0.05)


def test_scores_are_the_embeddings_similarities(monkeypatch):
    net = tiny.norm_net(4)
    algorithm = algorithms.prototypical(net, distance="cosine")
    episode = tiny.episode(queries=7)
    params = algorithm.init(jax.random.key(0), episode)
    state = algorithms.embedding_state(params)
    plain = algorithms.siamese(net).init(jax.random.key(0), episode)
    tiny.assert_equal(algorithms.embedding_state(plain), plain)
    x, labels = np.asarray(episode.query.x), np.asarray(episode.query.y)
    seen = {}

    def record(scores, same):
        seen["scores"] = scores
        return curve(scores, same)

    monkeypatch.setattr(verification, "receiver_operating_characteristic", record)
    verification.verify(net, state, x, labels, num_pairs=40, batch_size=8)
    pairs = verification.draw_pairs(labels, 40)
    embedded = np.asarray(net.apply(state, jnp.asarray(x), norm="stored")[0])
    a, b = embedded[pairs.first], embedded[pairs.second]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(
        seen["scores"], (a * b).sum(1) / norms, rtol=1e-4, atol=1e-5
    )


def test_examples_of_a_pool_are_those_that_are_there():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 255, (3, 4, 2, 2, 1), np.uint8)
    x, labels = verification.pool_examples(make_pool(images, np.array([4, 2, 3])))
    np.testing.assert_array_equal(labels, [0, 0, 0, 0, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(x[5], images[1, 1])
    state = LearnerState({}, {}, {})
    seen = verification._embed(IDENTITY, state, x, 4)
    np.testing.assert_allclose(seen, x.reshape(9, -1) / 255, rtol=1e-6)


def test_whole_numbers_stay_whole_numbers():
    def take(state, x, norm):
        assert x.dtype == jnp.int32
        return jnp.eye(5)[x[:, 0]], state

    net = Learner(lambda key, x: LearnerState({}, {}, {}), take)
    x, labels = np.arange(10, dtype=np.int32)[:, None] % 5, np.arange(10) % 5
    found = verification.verify(net, LearnerState({}, {}, {}), x, labels, num_pairs=8)
    assert found.equal_error_rate == 0


def test_what_verification_refuses():
    draw = verification.draw_pairs
    for message, call in (
        (r"num_pairs=1: choose 2 or more", lambda: draw([0, 0, 1], 1)),
        (r"1 identities, with at most 3 examples", lambda: draw([0, 0, 0], 10)),
        (r"3 identities, with at most 1 examples", lambda: draw([0, 1, 2], 10)),
        (r"shape \(2,\) and same \(1,\)", lambda: curve([1.0, 2.0], [True])),
        (r"1 of the scores are not numbers", lambda: curve([np.nan], [True])),
        (r"2 pairs of one identity and 0 of two", lambda: curve([1, 2], [True, True])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    found = curve([2.0, 1.0], [True, False])
    with pytest.raises(ValueError, match=r"less than one of the 1 pairs.*at least 100"):
        found.true_accepts_at(0.01)
    with pytest.raises(
        ValueError, match=r"false_accept_rate=0: choose a number in \(0, 1\]"
    ):
        found.true_accepts_at(0)
    state, x = LearnerState({}, {}, {}), np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"2 labels for 3 examples"):
        verification.verify(IDENTITY, state, x, [0, 1])
    with pytest.raises(
        ValueError, match=r"similarity='dot': choose one of cosine, eucl"
    ):
        verification.verify(IDENTITY, state, x, [0, 1, 1], similarity="dot")


# -- intervals over identities ---------------------------------------------------------


def test_a_weight_counts_a_pair_so_many_times():
    rng = np.random.default_rng(0)
    scores, same = np.round(rng.normal(size=200), 1), rng.random(200) < 0.5
    weights = rng.integers(0, 4, 200)
    weighted = curve(scores, same, weights=weights)
    repeated = curve(np.repeat(scores, weights), np.repeat(same, weights))
    assert weighted.summary(0.1) == pytest.approx(repeated.summary(0.1))
    once = curve(scores, same, weights=np.ones(200))
    tiny.assert_equal(tuple(once), tuple(curve(scores, same)))


def drawn_identities(seed: int, people: int = 30, each: int = 6):
    """Pairs of one-dimensional examples, and the scores that they get."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), each)
    # people differ in how steady they are, which pairs of theirs share
    spread = rng.gamma(1.0, 1.0, people)[labels]
    x = 3 * rng.normal(size=people)[labels] + spread * rng.normal(size=len(labels))
    pairs = verification.draw_pairs(labels, 2000, seed=seed)
    return labels, pairs, -np.abs(x[pairs.first] - x[pairs.second])


def test_intervals_are_as_wide_as_other_identities_differ():
    rates, widths = [], []
    for seed in range(80):
        labels, pairs, scores = drawn_identities(seed)
        rates.append(curve(scores, pairs.same).equal_error_rate)
        if seed < 4:
            ends = verification.bootstrap_over_identities(
                scores, pairs, labels, num_samples=150, seed=seed
            )
            low, high = ends.equal_error_rate
            assert low < rates[-1] < high
            assert all(0 <= a < b <= 1 for a, b in ends)
            widths.append(high - low)
    found = np.mean(widths) / (2 * 1.96 * np.std(rates, ddof=1))
    assert 0.7 < found < 1.5
    # over pairs, as if each were another person's, they would be far too narrow
    rate = np.mean(rates)
    assert np.mean(widths) > 2 * (2 * 1.96 * np.sqrt(rate * (1 - rate) / 2000))


def test_the_same_seed_draws_the_same_intervals():
    labels, pairs, scores = drawn_identities(0, people=5)
    ends = [
        verification.bootstrap_over_identities(
            scores, pairs, labels, num_samples=20, seed=seed
        )
        for seed in (1, 1, 2)
    ]
    assert ends[0] == ends[1] != ends[2]


def test_what_the_intervals_refuse():
    labels, pairs, scores = drawn_identities(0)
    bootstrap = verification.bootstrap_over_identities
    with pytest.raises(ValueError, match=r"num_samples=1: choose 2 or more"):
        bootstrap(scores, pairs, labels, num_samples=1)
    with pytest.raises(
        ValueError, match=r"false_accept_rate=0: choose a number in \(0, 1\]"
    ):
        bootstrap(scores, pairs, labels, false_accept_rate=0)
    alike = pairs._replace(same=np.ones(2000, bool))
    with pytest.raises(ValueError, match=r"2000 pairs of one identity and 0 of two"):
        bootstrap(scores, alike, labels)


def test_hallucinations_embedding_is_without_its_generator():
    net = tiny.norm_net(4)
    state = algorithms.hallucination(net).init(jax.random.key(0), tiny.episode())
    embedding = algorithms.embedding_state(state)
    tiny.assert_equal(embedding.params, state.params["embedding"])
    assert net.apply(embedding, tiny.episode().query.x, norm="stored")[0].shape[1] == 4
