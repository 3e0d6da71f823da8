"""Answers fitted on validation episodes and measured on held-out ones."""

from __future__ import annotations

import numpy as np
import pytest

import metalstm
from metalstm import algorithms, data
from metalstm.calibration import episode_quantile, fit_temperature, probabilities
from metalstm.meta.confidence import (
    Confidence,
    EpisodeScores,
    collect_scores,
    fit_confidence,
    measure_confidence,
)

RNG = np.random.default_rng(0)
SPEC = data.EpisodeSpec(3, 2, 4)
HEAD = algorithms.nearest_centroid(unit_length=False)


@pytest.fixture(scope="module")
def pool():
    """30 classes around centres; each coordinate of an example names its class."""
    classes = np.arange(30.0)[:, None, None] * np.ones((1, 8, 2))
    return data.make_pool(classes.astype(np.float32))


def synthetic(num: int, way: int = 5, num_queries: int = 6) -> EpisodeScores:
    """Scores of a method whose episodes differ in difficulty."""
    labels = RNG.integers(0, way, (num, num_queries))
    ease = RNG.gamma(4.0, 0.5, (num, 1, 1))
    known = RNG.normal(size=(num, num_queries, way)) + ease * np.eye(way)[labels]
    return EpisodeScores(known, labels, RNG.normal(size=(num, 4, way)))


@pytest.fixture(scope="module")
def collected(pool):
    return collect_scores(HEAD, (), pool, SPEC, num_unknown=2, num_episodes=6)


def test_unknown_queries_are_of_other_classes_than_the_support(collected):
    assert collected.known.shape == (6, 12, 3)
    assert collected.unknown.shape == (6, 8, 3)
    # classes are points: a known query lies on a mean, an unknown one on none
    assert (collected.known.max(-1) > -0.1).all()
    assert (collected.unknown.max(-1) < -1.9).all()
    assert (collected.accuracies == 1).all()
    assert all((np.bincount(row) == 4).all() for row in collected.labels)


def test_without_unknown_classes_the_episodes_are_those_of_evaluate():
    noisy = data.make_pool(RNG.normal(size=(9, 8, 2)).astype(np.float32))
    options = {"num_episodes": 5, "seed": 4, "split": "validation"}
    result = metalstm.evaluate(HEAD, (), noisy, SPEC, **options)
    found = collect_scores(HEAD, (), noisy, SPEC, **options)
    np.testing.assert_allclose(found.accuracies, result.accuracies, rtol=1e-6)
    assert found.unknown.shape == (5, 0, 3)


def test_an_answer_is_a_label_a_probability_and_a_set():
    confidence = Confidence(2.0, known_threshold=0.5, set_threshold=0.3)
    scores = np.array([[2.0, 1.0, 0.0], [0.4, 0.3, 0.2], [0.5, -9.0, -9.0]])
    answers = confidence.answer(scores)
    assert answers.labels.tolist() == [0, -1, 0]
    np.testing.assert_array_equal(answers.probabilities, probabilities(scores, 2.0))
    assert answers.sets.tolist() == [
        [True, True, False],
        [True, True, True],
        [True, False, False],
    ]


def test_each_number_is_fitted_to_its_own_episodes():
    validation = synthetic(60)
    known, labels, _ = validation
    found = fit_confidence(validation, false_alarm_rate=0.1, coverage=0.9)
    assert found.temperature == fit_temperature(known[::2], labels[::2])
    likely = probabilities(known[1::2], found.temperature)
    of_label = np.array(
        [[p[y] for p, y in zip(*rows, strict=True)]
         for rows in zip(likely, labels[1::2], strict=True)]
    )  # fmt: skip
    assert found.set_threshold == -episode_quantile(-of_label, 0.9)
    assert found.known_threshold == -episode_quantile(-known.max(-1), 0.9)
    measured = measure_confidence(validation, found)
    assert measured.false_alarms[0] <= 0.1


def test_the_promises_hold_over_draws_of_validation_and_test():
    """An average over both, as the guarantee is."""
    reports = []
    for _ in range(150):
        drawn = synthetic(31)
        validation = EpisodeScores(*(part[:30] for part in drawn))
        test = EpisodeScores(*(part[[30, 30]] for part in drawn))
        confidence = fit_confidence(validation, false_alarm_rate=0.2, coverage=0.8)
        reports.append(measure_confidence(test, confidence))
    coverage = [report.coverage[0] for report in reports]
    false_alarms = [report.false_alarms[0] for report in reports]
    # three standard errors of 150 draws
    error = 3 * np.std(coverage) / np.sqrt(150)
    assert 0.8 - error < np.mean(coverage) < 0.8 + 2 / 16 + error
    assert np.mean(false_alarms) < 0.2 + 3 * np.std(false_alarms) / np.sqrt(150)


def test_the_report_is_shares_over_episodes_by_definition():
    test, confidence = synthetic(12), Confidence(1.0, 1.0, 0.25)
    report = measure_confidence(test, confidence)
    p = probabilities(test.known)
    sets = p >= 0.25
    covered = [np.mean([s[y] for s, y in zip(*e, strict=True)])
               for e in zip(sets, test.labels, strict=True)]  # fmt: skip
    assert report.coverage[0] == pytest.approx(np.mean(covered))
    assert report.set_size[0] == pytest.approx(sets.sum(-1).mean())
    assert report.false_alarms[0] == pytest.approx((test.known.max(-1) < 1).mean())
    assert report.misses[0] == pytest.approx((test.unknown.max(-1) >= 1).mean())
    assert report.accuracy[0] == pytest.approx((p.argmax(-1) == test.labels).mean())
    assert f"misses {100 * report.misses[0]:.1f} ±" in str(report)
    alone = test._replace(unknown=test.unknown[:, :0])
    assert np.isnan(measure_confidence(alone, confidence).misses[0])


def test_bad_input_is_refused(pool):
    with pytest.raises(ValueError, match="num_unknown=-1: choose 0 or more"):
        collect_scores(HEAD, (), pool, SPEC, num_unknown=-1)
    with pytest.raises(
        ValueError, match="num_unknown=28 and way=3 are more than the 30"
    ):
        collect_scores(HEAD, (), pool, SPEC, num_unknown=28)
    with pytest.raises(ValueError, match="num_episodes=0: choose 1 or more"):
        collect_scores(HEAD, (), pool, SPEC, num_episodes=0)
    with pytest.raises(ValueError, match="a regression has no confidence"):
        collect_scores(HEAD, (), pool, data.SinusoidSpec(shot=2))
    hopeless = algorithms.logistic_regression(penalty=1e-12, unit_length=False)
    with pytest.raises(ValueError, match="scores that are not finite"):
        collect_scores(hopeless, (), pool, SPEC, num_episodes=2, batch_size=2)
    with pytest.raises(ValueError, match=r"coverage=1.0: choose a number in"):
        fit_confidence(synthetic(9), coverage=1.0)
    with pytest.raises(ValueError, match="number of episodes=1: choose 2 or more"):
        fit_confidence(synthetic(1))
    with pytest.raises(ValueError, match=r"10 episodes are too few for share=0.95"):
        fit_confidence(synthetic(10))
