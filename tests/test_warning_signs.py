"""What goes wrong in meta-training is said once, with what to try."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metalstm
from metalstm import algorithms, data, learned_optimizers, nn, rules
from metalstm.algorithms.gradient.adaptation import support_metrics
from metalstm.inner import Trace
from metalstm.learned_optimizers import problems
from metalstm.meta.warning_signs import WarningSigns

SPEC = data.ClusterSpec(way=3, shot=2, dim=4)
NET = nn.mlp(3, widths=(4,))


def fitted(algorithm, spec, num_steps, rate=1e-3, **options):
    optimizer = optax.adam(rate)
    episode = algorithm.train_sampler(spec).sample(jax.random.key(0), None)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    loop = metalstm.make_train_loop(
        algorithm, optimizer, spec, num_tasks=2, steps_per_call=10
    )
    return metalstm.fit(
        loop,
        metalstm.init_fit_state(state),
        None,
        num_steps=num_steps,
        steps_per_call=10,
        report_every=10,
        **options,
    )


def test_an_inner_loop_that_diverges_is_said_once():
    algorithm = algorithms.fomaml(NET, 1e3, num_steps=4)
    with pytest.warns(RuntimeWarning) as said:
        fitted(algorithm, SPEC, 150, rate=1e-6)
    (text,) = {str(one.message) for one in said if "inner loop" in str(one.message)}
    assert "step 50: in" in text
    assert "gradient_scale='calibrated'" in text
    assert len([one for one in said if "inner loop" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*the learned optimizer diverges")
def test_a_learned_optimizer_that_goes_up_is_said():
    family = problems.quadratics(3)
    algorithm = learned_optimizers.learned_optimizer(
        family,
        rules.learned_sgd(30.0),
        num_tasks=2,
        unroll_steps=2,
        horizon=4,
        differentiation=metalstm.first_order(),
    )
    with pytest.warns(RuntimeWarning, match="above the one that it started from: low"):
        fitted(
            algorithm,
            learned_optimizers.ProblemSampler(family, num_batches=3),
            60,
            rate=1e-9,
        )


def test_a_run_at_chance_after_its_budget_is_said():
    untrained = algorithms.fomaml(NET, 1e-6, num_steps=1)
    with pytest.warns(RuntimeWarning, match="accuracy is where it began .* at the end"):
        fitted(untrained, SPEC, 200, rate=1e-9)


def test_a_run_that_learns_is_silent_and_its_logger_hears_everything():
    heard = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        algorithm = algorithms.meta_lstm(NET, num_steps=2)
        fitted(algorithm, SPEC, 200, rate=1e-2, report=heard.__setitem__)
    assert list(heard) == list(range(10, 201, 10))
    assert {"loss", "accuracy", "support_loss", "grad_norm"} <= set(heard[200])
    assert heard[200]["loss"] < heard[10]["loss"]


def test_signs_are_of_the_last_steps_and_not_of_a_bad_start():
    signs = WarningSigns()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        signs.look({"support_loss_rose": np.ones(30)}, 30)
        signs.look({"support_loss_rose": np.zeros(60)}, 90)
        signs.look_at_end()
    with pytest.warns(RuntimeWarning, match="step 120: in 60% of the tasks"):
        signs.look({"support_loss_rose": np.ones(30)}, 120)


def test_regression_has_no_chance():
    signs = WarningSigns()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        signs.look({"accuracy": -np.ones(300), "loss": np.ones(300)}, 300)
        signs.look_at_end()


def test_images_of_a_pool_all_alike_are_said():
    same = np.ones((3, 4, 5), np.float32)
    with pytest.warns(RuntimeWarning, match="all 12 examples are the same"):
        data.make_pool(same)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        data.make_pool(same + np.arange(3, dtype=np.float32)[:, None, None])


def test_a_class_with_one_image_is_refused():
    pool = data.make_pool([np.ones((1, 4), np.float32), np.zeros((9, 4), np.float32)])
    with pytest.raises(ValueError, match="need 2 images a class, but the smallest cla"):
        data.EpisodeSpec(2, 1, queries=1).sample(jax.random.key(0), pool)


def test_losses_that_are_not_finite_rose():
    def rose(*losses):
        trace = Trace(jnp.array(losses), None)
        return support_metrics(trace, None)["support_loss_rose"]

    assert rose(1.0, jnp.nan) == 1
    assert rose(1.0, 0.5) == 0
    assert rose(1.0) == 0  # one update: no other loss to compare


@pytest.mark.parametrize("build", [algorithms.reptile, algorithms.implicit_maml])
def test_methods_with_a_gradient_of_their_own_notice_it_too(build):
    def metrics_of(rate, **options):
        algorithm = build(NET, optax.sgd(rate), num_steps=4, **options)
        keys = jax.random.split(jax.random.key(0), 2)
        tasks = jax.vmap(algorithm.train_sampler(SPEC).sample, (0, None))(keys, None)
        first = jax.tree.map(lambda leaf: leaf[0], tasks)
        params = algorithm.init(jax.random.key(1), first)
        carry = algorithm.init_carry(jax.random.key(2), params, first)
        return algorithm.meta_gradient(params, carry, keys, tasks)[2]

    assert metrics_of(1e3)["support_loss_rose"] == 1
    assert metrics_of(1e-3)["support_loss_rose"] == 0
    assert "support_loss_rose" not in metrics_of(1e-3, batch_size=2)
