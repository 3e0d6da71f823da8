"""Temperature, reliability and conformal quantiles, by closed form or definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from metalstm import calibration

RNG = np.random.default_rng(0)
WAY = 4


def drawn_scores(temperature: float, num: int = 20_000):
    """Scores whose labels follow softmax(scores / temperature)."""
    scores = RNG.normal(size=(num, WAY))
    p = np.exp(scores / temperature)
    cumulative = np.cumsum(p / p.sum(-1, keepdims=True), -1)
    return scores, (RNG.random((num, 1)) > cumulative).sum(-1)


def loss(scores, labels, temperature) -> float:
    total = 0.0
    for row, label in zip(scores / temperature, labels, strict=True):
        total += math.log(sum(math.exp(s - row[label]) for s in row))
    return total / len(labels)


def test_two_scores_of_one_gap_have_a_temperature_in_closed_form():
    gap, right = 3.0, 0.8  # sigmoid(gap / T) = 0.8
    scores = np.tile([gap, 0.0], (10, 1))
    labels = np.array([0] * 8 + [1] * 2)
    expected = gap / math.log(right / (1 - right))
    found = calibration.fit_temperature(scores, labels)
    assert found == pytest.approx(expected, rel=1e-9)
    # scores in episodes, and of another unit and origin
    moved = 1e-4 * scores.reshape(5, 2, 2) + 7
    found = calibration.fit_temperature(moved, labels.reshape(5, 2))
    assert found == pytest.approx(1e-4 * expected, rel=1e-6)


def test_the_temperature_is_the_least_of_the_loss_and_what_drew_the_labels():
    scores, labels = drawn_scores(0.4)
    found = calibration.fit_temperature(scores, labels)
    assert found == pytest.approx(0.4, rel=0.05)
    some = slice(300)
    found = calibration.fit_temperature(scores[some], labels[some])
    grid = found * np.exp(np.linspace(-0.02, 0.02, 41))
    losses = [loss(scores[some], labels[some], t) for t in grid]
    assert np.argmin(losses) == 20
    fitted = calibration.probabilities(scores, found)
    error = calibration.reliability(fitted, labels).calibration_error
    assert (
        error
        < 0.03
        < calibration.reliability(
            calibration.probabilities(scores), labels
        ).calibration_error
    )


def test_reliability_by_definition():
    p = calibration.probabilities(RNG.normal(size=(5, 40, WAY)))
    labels = RNG.integers(0, WAY, (5, 40))
    found = calibration.reliability(p, labels, num_bins=6)
    flat, truth = p.reshape(-1, WAY), labels.ravel()
    expected = 0.0
    for b in range(6):
        inside = [
            (row.max(), row.argmax() == y)
            for row, y in zip(flat, truth, strict=True)
            if b / 6 < row.max() <= (b + 1) / 6
        ]
        assert found.counts[b] == len(inside)
        if not inside:
            assert np.isnan(found.accuracy[b])
            continue
        confidence, right = np.mean(inside, 0)
        assert found.confidence[b] == pytest.approx(confidence)
        assert found.accuracy[b] == pytest.approx(right)
        expected += len(inside) / len(truth) * abs(confidence - right)
    assert found.calibration_error == pytest.approx(expected)
    certain = calibration.reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain.counts[-1] == 1
    assert certain.calibration_error == 0


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("distinct", [True, False])
def test_the_quantile_holds_for_each_episode_in_turn_as_the_new_one(share, distinct):
    """Exchangeable means: any of the E + 1 episodes may be the new one."""
    values = RNG.normal(size=(12, 7)) + 3 * RNG.normal(size=(12, 1))
    values = values if distinct else np.round(values)
    covered = [
        np.mean(episode <= calibration.episode_quantile(np.delete(values, k, 0), share))
        for k, episode in enumerate(values)
    ]
    assert np.mean(covered) >= share
    threshold = calibration.episode_quantile(values, share)
    mass = [np.sum(values <= t) / (7 * 13) for t in np.sort(values, None)]
    assert threshold == np.sort(values, None)[np.argmax(np.array(mass) >= share)]


def test_the_ordinary_quantile_promises_too_much():
    """It takes the queries of an episode as independent; here they are all equal."""
    values = np.repeat(np.arange(10.0)[:, None], 50, 1)
    share, covered = 0.95, []
    for k in range(10):
        others = np.delete(values, k, 0)
        rank = math.ceil(share * (others.size + 1))
        covered.append(np.mean(values[k] <= np.sort(others, None)[rank - 1]))
    assert np.mean(covered) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"9 episodes are too few .*: give 19 or more"):
        calibration.episode_quantile(values[1:], share)


def test_sets_hold_the_labels_that_are_likely_enough():
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])
    assert calibration.label_sets(p, 0.3).sum(-1).tolist() == [2, 2]
    assert calibration.label_sets(p, 0.45).sum(-1).tolist() == [1, 0]


SCORES = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration.fit_temperature(SCORES, [0, 1, 0]), "one of the 3 labels"),
        (lambda: calibration.fit_temperature(SCORES, [1, 0, 0]), "no higher than"),
        (lambda: calibration.fit_temperature(SCORES, [0, 1]), r"labels of shape \[2\]"),
        (lambda: calibration.fit_temperature(SCORES, [0, 1, 2]), r"integers in \[0, 2"),
        (lambda: calibration.fit_temperature(SCORES, [0.0, 1.0, 1]), "are float"),
        (lambda: calibration.fit_temperature(SCORES / 0, [0, 1, 0]), "are not finite"),
        (lambda: calibration.probabilities(SCORES, 0), "temperature=0: choose"),
        (lambda: calibration.reliability(SCORES, [0, 1, 0], num_bins=0), "num_bins=0"),
        (lambda: calibration.episode_quantile(SCORES, 1.0), "share=1.0: choose"),
        (lambda: calibration.episode_quantile(SCORES[0], 0.5), r"shape \[2\] with 0"),
        (lambda: calibration.episode_quantile(SCORES, 0.8), "give 4 or more"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*encountered in divide")
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
