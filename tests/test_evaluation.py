"""The evaluator: its interval, its episodes, and comparisons on the same episodes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalstm
from metalstm import algorithms, nn
from metalstm.algorithms.common import make_algorithm
from metalstm.base import Batch, Episode
from metalstm.data import ClusterSpec, SinusoidSpec
from metalstm.data.episodes import episode_key
from metalstm.meta.confidence import collect_scores
from metalstm.meta.evaluation import (
    Evaluation,
    evaluate,
    make_evaluate,
    paired_difference,
)
from metalstm.statistics import mean_and_ci95

SPEC = ClusterSpec(way=3, shot=1, queries=4, spread=1.0)
NEAREST = algorithms.nearest_neighbour()


def first_class():
    """Always answers class 0, so its accuracy is known: one in `way`."""

    def predict(params, key, support, query_x, *, num_classes):
        scores = jnp.zeros((query_x.shape[0], num_classes)).at[:, 0].set(1)
        return scores * params

    return make_algorithm(
        init=None, predict=predict, trainable=False, query_norm="support+1"
    )


@pytest.fixture(scope="module")
def run():
    return make_evaluate(NEAREST, SPEC, batch_size=4)


def make(accuracies, **changes) -> Evaluation:
    values = np.asarray(accuracies, np.float32)
    fields = {"query_norm": None, "split": "test", "seed": 0} | changes
    return Evaluation(values, *mean_and_ci95(values), **fields)


def test_the_interval_is_196_standard_errors():
    values = np.array([0.2, 0.4, 0.9, 0.7])
    mean, ci95 = mean_and_ci95(values)
    assert mean == pytest.approx(0.55)
    variance = sum((v - 0.55) ** 2 for v in values) / 3
    assert ci95 == pytest.approx(1.96 * variance**0.5 / 2)


def test_an_episode_is_a_function_of_seed_split_and_index(run):
    """By hand for one of them; more episodes only add to the list."""
    six = run((), None, num_episodes=6)
    nine = run((), None, num_episodes=9)
    np.testing.assert_array_equal(nine.accuracies[:6], six.accuracies)
    assert len(nine.accuracies) == 9
    assert nine.accuracies.dtype == np.float32
    episode = SPEC.sample(episode_key(0, "test", 0, 5))
    scores = NEAREST.predict(
        (), None, episode.support, episode.query.x, num_classes=SPEC.way
    )
    right = np.mean(np.argmax(scores, 1) == np.asarray(episode.query.y))
    assert six.accuracies[5] == np.float32(right)
    for other in ({"seed": 1}, {"split": "validation"}):
        changed = run((), None, num_episodes=6, **other)
        assert np.any(changed.accuracies != six.accuracies)
    assert (six.seed, six.split, six.query_norm) == (0, "test", None)
    assert (six.mean, six.ci95) == mean_and_ci95(six.accuracies)


def test_batches_and_mappings_change_no_accuracy(run):
    expected = run((), None, num_episodes=5).accuracies
    for options in ({"batch_size": 3}, {"batch_size": 2, "task_mapping": "unroll"}):
        other = evaluate(NEAREST, (), None, SPEC, num_episodes=5, **options)
        np.testing.assert_array_equal(other.accuracies, expected)


def test_two_methods_meet_the_same_episodes(run):
    floor = evaluate(first_class(), jnp.float32(1), None, SPEC, num_episodes=8)
    np.testing.assert_allclose(floor.accuracies, 1 / 3, rtol=1e-6)
    assert floor.query_norm == "support+1"
    nearest = run((), None, num_episodes=8)
    mean, ci95 = paired_difference(nearest, floor)
    assert mean == pytest.approx(nearest.mean - 1 / 3, abs=1e-6)
    assert ci95 == pytest.approx(nearest.ci95, abs=1e-6)


def test_a_paired_difference_is_tighter_than_the_two_intervals():
    rng = np.random.default_rng(0)
    hardness = rng.normal(0.6, 0.1, 200)
    a, b = make(hardness + 0.02), make(hardness + 0.001 * rng.normal(size=200))
    mean, ci95 = paired_difference(a, b)
    assert mean == pytest.approx(0.02, abs=1e-3)
    assert ci95 < 0.02 < a.ci95 + b.ci95


def test_regression_is_scored_by_minus_the_squared_error():
    def predict(params, key, support, query_x, *, num_classes):
        assert num_classes is None
        return jnp.zeros((query_x.shape[0], 1))

    spec = SinusoidSpec(shot=2, queries=5)
    zero = make_algorithm(init=None, predict=predict, trainable=False)
    result = evaluate(zero, (), None, spec, num_episodes=3, batch_size=3)
    episode = spec.sample(episode_key(0, "test", 0, 2))
    expected = -np.mean(np.square(episode.query.y))
    np.testing.assert_allclose(result.accuracies[2], expected, rtol=1e-5)


class Waves(NamedTuple):
    """Several sinusoids of one input. A sampler with nothing but `sample`."""

    num_targets: int

    def sample(self, key, pool):
        x = jax.random.uniform(key, (9, 1))
        part = Batch(x, jnp.sin(x * jnp.arange(1.0, self.num_targets + 1)))
        return Episode(part, part)


def test_a_regression_of_several_targets_has_an_error_for_each():
    """Against numpy in float64."""

    def predict(params, key, support, query_x, *, num_classes):
        assert num_classes is None
        return jnp.tile(query_x, 3) * jnp.array([1.0, 0.5, 0.25])

    spec, scaled = Waves(3), make_algorithm(init=None, predict=predict, trainable=False)
    result = evaluate(scaled, (), None, spec, num_episodes=5, batch_size=3)
    expected = []
    for index in range(5):
        x, y = spec.sample(episode_key(0, "test", 0, index), None).query
        answers = np.asarray(x, np.float64) * [1, 0.5, 0.25]
        expected.append(np.square(answers - np.asarray(y, np.float64)).mean(0))
    np.testing.assert_allclose(result.errors, expected, rtol=1e-5)
    np.testing.assert_allclose(result.accuracies, -np.mean(expected, 1), rtol=1e-5)
    for index, (mean, ci95) in enumerate(result.by_target):
        of_target = np.array(expected)[:, index]
        np.testing.assert_allclose(mean, of_target.mean(), rtol=1e-5)
        half = 1.96 * of_target.std(ddof=1) / 5**0.5
        np.testing.assert_allclose(ci95, half, rtol=1e-4)
    said = str(result)
    assert "%" not in said
    mean, ci95 = result.by_target[1]
    assert f", {mean:.4g} ± {ci95:.2g}, " in said.split("by target")[1]


def test_one_target_is_not_said_twice_and_classes_have_no_error(run):
    zero = make_algorithm(
        init=None, predict=lambda p, k, s, x, num_classes: 0 * x, trainable=False
    )
    one = evaluate(zero, (), None, Waves(1), num_episodes=2, batch_size=2)
    np.testing.assert_allclose(-one.errors[:, 0], one.accuracies)
    assert "by target" not in str(one)
    classes = run((), None, num_episodes=2)
    assert (classes.errors, classes.by_target, classes.regression) == (None, [], False)


def test_a_regression_whose_sampler_only_samples_is_trained_saved_and_tested(tmp_path):
    spec, optimizer = Waves(2), optax.sgd(0.1)
    algorithm = algorithms.maml(nn.mlp(2, widths=(4,)), 0.1, num_steps=1)
    episode = spec.sample(jax.random.key(0), None)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    step = metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=1)
    state, metrics = step(state, None)
    assert metrics["finite"].all()
    path = metalstm.save(tmp_path / "waves.npz", algorithm, state.params, None, spec)
    assert metalstm.load(path).regression
    with pytest.raises(ValueError, match="choose classes, a regression has no confid"):
        collect_scores(algorithm, state.params, None, spec)


def test_labels_need_the_number_of_classes():
    class Labels(NamedTuple):
        def sample(self, key, pool):
            part = Batch(jnp.zeros((2, 1)), jnp.arange(2))
            return Episode(part, part)

    with pytest.raises(ValueError, match=r"draws labels, .*: give it an attribute way"):
        evaluate(NEAREST, (), None, Labels(), num_episodes=2)


def test_a_result_prints_its_mode():
    text = str(make([0.5, 0.7], query_norm="support"))
    assert text == "60.00 ± 19.60 % (2 test episodes, support)"
    assert "no batch norm" in str(make([0.5, 0.7]))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"split": "validation"},
        {"accuracies": [0.1, 0.2, 0.3]},
    ],
)
def test_a_paired_difference_of_different_episodes_is_refused(other):
    with pytest.raises(ValueError, match=r"different episodes: 2 of test seed 0 agai"):
        paired_difference(make([0.5, 0.6]), make(**{"accuracies": [0.5, 0.7]} | other))


def test_too_few_episodes_are_refused(run):
    with pytest.raises(ValueError, match=r"num_episodes=1: choose at least 2"):
        run((), None, num_episodes=1)
    with pytest.raises(ValueError, match=r"values has 1 entries: .* needs 2 or more"):
        mean_and_ci95(np.ones(1))


def test_an_unknown_split_is_refused(run):
    with pytest.raises(ValueError, match=r"split='val': choose one of train"):
        run((), None, num_episodes=2, split="val")
