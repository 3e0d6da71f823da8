"""Evolution over whole runs: its estimate, common random numbers, progress."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import rules
from metalstm.base import UpdateRule
from metalstm.learned_optimizers import make_paired_runs
from metalstm.learned_optimizers.problems import ProblemFamily

STEPS = jnp.int32(4)
RULE = rules.learned_sgd(0.05)


def family() -> ProblemFamily:
    """|theta - y|^2 / 2 + 1, with a minibatch's noise."""
    return ProblemFamily(
        sample=lambda key, data: jax.random.normal(key, (3,)),
        init=lambda key, task: jax.random.normal(key, (3,)),
        batch=lambda key, data, size=None: jax.random.normal(key, (size or 1, 3)),
        loss=lambda params, task, batch: (
            0.5 * jnp.square(params - task - 0.1 * batch.mean(0)).sum() + 1
        ),
    )


def runs(rule=RULE, std=0.01, num_pairs=64, num_steps=STEPS, params=0.05, **options):
    run = make_paired_runs(family(), rule, num_pairs=num_pairs, eval_batch=8, **options)
    return run(jnp.float32(params), std, None, jax.random.key(0), num_steps)


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_estimate_is_the_slope_of_the_score(antithetic):
    """Against central differences of the score on the very same runs."""
    found = runs(antithetic=antithetic, num_pairs=64 if antithetic else 256)
    slope = found.noises * found.differences / (2 * 0.01)
    by = 1e-2
    higher, lower = (runs(params=0.05 + sign * by, std=0.0).score for sign in (1, -1))
    wanted = (higher - lower) / (2 * by)
    error = 2 * np.std(slope) / len(slope) ** 0.5
    assert wanted < -0.3
    assert abs(slope.mean() - wanted) < error < 0.8 * abs(wanted)


def test_a_pair_that_is_not_perturbed_has_no_difference():
    found = runs(std=0.0)
    np.testing.assert_array_equal(found.differences, 0)
    np.testing.assert_array_equal(found.noises, 0)


def test_runs_are_as_long_as_asked_and_are_traced_once():
    traces = []

    def bind(params):
        traces.append(params)
        return RULE.bind(params)

    rule = RULE._replace(bind=bind)
    run = make_paired_runs(family(), rule, num_pairs=2, eval_batch=8)
    scores, counts = [], []
    for n in (0, 2, 8):
        found = run(jnp.float32(0.05), 0.0, None, jax.random.key(0), jnp.int32(n))
        scores.append(float(found.score))
        counts.append(len(traces))
    assert scores[0] == pytest.approx(np.log(1.02), abs=1e-5)
    assert scores[0] > scores[1] > scores[2]
    assert counts[0] == counts[1] == counts[2] > 0


def test_runs_that_diverge_count_as_ten_times_worse():
    found = runs(params=20.0)
    assert found.diverged > 0.9
    assert found.score == pytest.approx(np.log(10.02), abs=0.1)
    assert np.isfinite(found.differences).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rules_are_told_their_progress(share):
    """A rule that moves by its progress alone; -1 where it knows none."""

    def bind(params):
        def update(updates, state, params=None, *, progress, **extra):
            return jax.tree.map(lambda g: 0 * g + progress, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    rule = UpdateRule(lambda key, params: jnp.float32(0), bind)
    found = runs(rule, 0.0, 2, params=0.0, tell_progress=share)
    told = 0 + 0.25 + 0.5 + 0.75
    shift = told if share else -4.0
    problem = family()
    scores = []
    for key in jax.random.split(jax.random.key(0), 2):
        keys = jax.random.split(key, 6)
        task, start = problem.sample(keys[1], None), problem.init(keys[2], None)
        held = problem.batch(keys[4], None, 8)
        ratio = problem.loss(start + shift, task, held) / problem.loss(
            start, task, held
        )
        scores.append(np.log(min(float(ratio), 10.0) + 0.02))
    tiny.assert_close(found.score, np.mean(scores), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0: choose 1 or more"),
        ({"tell_progress": 2.0}, r"tell_progress=2.0: choose a number in \[0, 1\]"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_paired_runs(family(), RULE, **{"num_pairs": 1} | options)
