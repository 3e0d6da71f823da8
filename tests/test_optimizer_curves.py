"""Curves, grids and summaries of optimizers on problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalstm import rules
from metalstm.learned_optimizers import problems
from metalstm.learned_optimizers.curves import (
    curve_difference,
    loss_curves,
    make_loss_curves,
    summary,
    sweep,
)
from metalstm.learned_optimizers.problems import ProblemFamily

SMALL = {"num_instances": 3, "num_steps": 4, "task_mapping": "vmap"}


def bowl(noise: float = 0.0) -> ProblemFamily:
    """a theta^2 / 2, a ~ U(1, 2): SGD's losses are known; a batch adds an offset."""

    def batch(key, data, size=None):
        return noise * jax.random.normal(key, (size or 4,))

    return ProblemFamily(
        sample=lambda key, data: jax.random.uniform(key, minval=1.0, maxval=2.0),
        init=lambda key, task: jax.random.normal(key),
        batch=batch,
        loss=lambda theta, a, batch: 0.5 * a * theta**2 + batch.mean(),
    )


def test_a_curve_is_the_training_it_says():
    """L_t = L_0 (1 - rate a)^(2 t); and every record_every-th of it."""
    curves = loss_curves(bowl(), optax.sgd(0.1), **SMALL)
    assert curves.shape == (3, 5)
    assert curves.dtype == np.float32
    # the first step tells a, the others must follow
    shrink = curves[:, 1] / curves[:, 0]
    expected = curves[:, :1] * shrink[:, None] ** np.arange(5)
    np.testing.assert_allclose(curves, expected, rtol=1e-5)
    assert (shrink > 0.8**2).all()
    assert (shrink < 0.9**2).all()
    assert len(np.unique(curves[:, 0])) == 3
    sparse = loss_curves(bowl(), optax.sgd(0.1), record_every=2, **SMALL)
    np.testing.assert_allclose(sparse, curves[:, ::2], rtol=1e-6)
    scanned = loss_curves(bowl(), optax.sgd(0.1), **SMALL | {"task_mapping": "scan"})
    np.testing.assert_allclose(scanned, curves, rtol=1e-6)


def test_the_last_part_may_be_shorter():
    run = lambda every: loss_curves(  # noqa: E731
        bowl(), optax.sgd(0.1), **SMALL | {"record_every": every, "num_steps": 4}
    )
    np.testing.assert_allclose(run(3), run(1)[:, [0, 3, 4]], rtol=1e-6)


def test_every_optimizer_meets_the_same_instances_and_minibatches():
    slow, fast = (
        loss_curves(bowl(noise=1.0), optax.sgd(rate), **SMALL) for rate in (0.0, 1e-9)
    )
    np.testing.assert_allclose(slow, fast, atol=1e-5)
    assert np.ptp(slow, axis=1).min() > 0.05  # the minibatches differ, step by step
    other = loss_curves(bowl(noise=1.0), optax.sgd(0.0), seed=1, **SMALL)
    assert np.abs(other - slow).min() > 1e-3


def test_a_large_batch_measures_what_is_reported():
    noisy = {**SMALL, "num_instances": 20}
    still = bowl(noise=1.0), optax.sgd(0.0)
    small = loss_curves(*still, **noisy)
    large = loss_curves(*still, eval_batch=10_000, **noisy)
    assert np.std(large, axis=1).mean() < 0.03 < 0.3 < np.std(small, axis=1).mean()


def test_a_rule_that_reads_loss_and_parameters_gets_them():
    rule = rules.lstm_gates(hidden_size=1)
    run = make_loss_curves(problems.quadratics(2), rule, **SMALL)
    params = rule.init(jax.random.key(0), {"theta": jnp.zeros(2)})
    first, again = run(params), run(params, None, 1)
    assert np.isfinite(first).all()
    assert np.abs(first[:, 0] - again[:, 0]).min() > 1e-4


def test_a_sweep_finds_the_rate_and_says_whether_the_grid_brackets_it():
    """On a theta^2 / 2 with a in (1, 2), a rate near 2/3 is best in one step."""
    rule = rules.tunable(optax.sgd, learning_rate=0.1, momentum=0.0)
    grid = {"learning_rate": [0.01, 0.1, 0.66, 0.99], "momentum": [0.0, 0.9]}
    settings = {**SMALL, "num_instances": 8, "num_steps": 1}
    result = sweep(bowl(), rule, grid, score="mean_log", **settings)
    np.testing.assert_allclose(result.best["learning_rate"], 0.66)
    assert result.inside == {"learning_rate": True, "momentum": False}
    assert result.curves.shape == (8, 8, 2)
    alone = loss_curves(bowl(), optax.sgd(0.66, momentum=0.0), **settings)
    np.testing.assert_allclose(result.best_curves, alone, rtol=1e-4, atol=1e-8)
    small = sweep(bowl(), rule, grid | {"learning_rate": [0.01, 0.1]}, **settings)
    assert not small.inside["learning_rate"]


def test_a_point_that_diverges_is_not_chosen():
    rule = rules.tunable(optax.sgd, learning_rate=0.1)
    result = sweep(bowl(), rule, {"learning_rate": [0.01, 1e30]}, **SMALL)
    assert result.scores[1] == np.inf
    np.testing.assert_allclose(result.best["learning_rate"], 0.01)


def test_a_summary_tells_divergence_from_success():
    curves = np.ones((200, 2), np.float32)
    curves[:, 1] = np.linspace(0.1, 0.3, 200)
    curves[7, 1] = 50.0
    result = summary(curves)
    np.testing.assert_allclose(result.mean, curves[:, 1].mean(), rtol=1e-6)
    assert 0.3 < result.ci95 < 0.6
    np.testing.assert_allclose(result.median, np.median(curves[:, 1]))
    np.testing.assert_allclose(result.mean_log, np.log(curves[:, 1]).mean(), rtol=1e-5)
    assert 0.29 < result.p99 < 0.31
    assert result.share_diverged == 1 / 200
    curves[8, 1] = np.nan
    broken = summary(curves)
    assert broken.mean == broken.ci95 == broken.mean_log == np.inf
    assert broken.share_diverged == 2 / 200
    assert broken.median < 0.3
    assert summary(curves, at=0).share_diverged == 0


def test_differences_are_taken_instance_by_instance():
    a = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 9.0]])
    mean, ci95 = curve_difference(a, a - 1)
    assert (mean, ci95) == (1.0, 0.0)
    mean, ci95 = curve_difference(2 * a, a, log=True)
    np.testing.assert_allclose([mean, ci95], [np.log(2), 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 2\) are not in pairs"):
        curve_difference(a, a[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_instances": 0}, r"num_instances=0: choose 1 or more"),
        ({"num_steps": 0}, r"num_steps=0: choose 1 or more"),
        ({"record_every": 0}, r"record_every=0: choose 1 or more"),
    ],
)
def test_wrong_lengths_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss_curves(bowl(), rules.learned_sgd(), **SMALL | options)


@pytest.mark.parametrize(
    ("rule", "grid", "options", "message"),
    [
        ({"learning_rate": 0.1}, {"learning_rate": []}, {}, r"give every hyper-param"),
        ({"learning_rate": 0.1}, {}, {}, r"grid={}: give every hyper-parameter"),
        ({"learning_rate": 0.1}, {"rate": [1]}, {}, r"grid names rate but the rule ha"),
        ({}, {"learning_rate": [1]}, {"score": "best"}, r"score='best': choose"),
    ],
)
def test_wrong_grids_are_refused(rule, grid, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(bowl(), rules.tunable(optax.sgd, **rule), grid, **SMALL, **options)
