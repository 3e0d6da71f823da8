"""The trainer: resuming, chunks, devices, failures, what an algorithm may override."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import algorithms, rules
from metalstm.algorithms.common import make_algorithm
from metalstm.base import Aux, LearnerState
from metalstm.data import ClusterSpec
from metalstm.meta import fitting
from metalstm.meta import step as meta_step
from metalstm.meta.evaluation import make_evaluate

TASKS = 4
SPEC = ClusterSpec(way=tiny.WAY, shot=tiny.SHOT, queries=2, dim=tiny.FEATURES)
EPISODE = SPEC.sample(jax.random.key(0))
FROZEN = algorithms.fomaml(
    tiny.norm_net(), 0.1, num_steps=1, query_norm="frozen", train_queries=1
)


def scalar_loss(params, key, episode):
    """As small as a meta-loss can be that uses its key and its episode."""
    noise = jax.random.uniform(key)
    return jnp.mean((params["w"] * episode.query.x - noise) ** 2), Aux({"noise": noise})


def toy(**slots):
    options = {"loss": scalar_loss, "predict": None} | slots
    return make_algorithm(
        init=lambda key, episode: {"w": jax.random.normal(key, (tiny.FEATURES,))},
        **options,
    )


def start(algorithm, optimizer=None, seed=0):
    optimizer = optimizer or meta_step.adam_clipped()
    return fitting.init_fit_state(
        meta_step.init_train_state(algorithm, optimizer, seed, EPISODE)
    )


def make_loop(algorithm, optimizer=None, **options):
    return meta_step.make_train_loop(
        algorithm,
        optimizer or meta_step.adam_clipped(),
        SPEC,
        **{"num_tasks": TASKS} | options,
    )


def copied(state):
    """What a checkpoint gives back: new arrays on the host."""
    return jax.tree.map(np.array, state)


@pytest.fixture(scope="module")
def toy_loop():
    return make_loop(toy())


@pytest.fixture(scope="module")
def frozen_loop():
    return make_loop(FROZEN)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(frozen_loop):
    """Parameters, optimizer, carry and the best so far, through a copy on the host."""

    def validate(params):
        return float(params.learner.params["Dense_1"]["kernel"].sum())

    options = {"validate": validate, "validate_every": 2}
    whole = fitting.fit(frozen_loop, start(FROZEN), None, num_steps=5, **options)
    saved = []
    part = fitting.fit(
        frozen_loop,
        start(FROZEN),
        None,
        num_steps=3,
        save=lambda state: saved.append(copied(state)),
        save_every=3,
        validate=validate,
        validate_every=2,
    )
    assert part.train.step == 3
    resumed = fitting.fit(frozen_loop, saved[-1], None, num_steps=5, **options)
    tiny.assert_equal(resumed.train, whole.train)
    moved = whole.train.params.learner.params, start(FROZEN).train.params.learner.params
    assert tiny.max_difference(*moved) > 1e-3
    again = fitting.fit(frozen_loop, start(FROZEN, seed=1), None, num_steps=5)
    assert tiny.max_difference(again.train.params, whole.train.params) > 1e-3


def test_running_statistics_are_the_mean_over_tasks_and_steps(frozen_loop):
    """The carry of query_norm="frozen", absorbed where `predict` reads it."""
    seen = []
    net = tiny.norm_net()

    @tiny.quick_jit
    def gathered(params, step):
        def one(task):
            episode = FROZEN.train_sampler(SPEC).sample(
                meta_step.episode_key(0, "train", step, task)
            )
            inner, _ = FROZEN_BATCH.adapt(params, jax.random.key(0), episode.support)
            state = LearnerState(inner.params, params.learner.stats, {})
            return net.apply(state, episode.query.x, norm="gather")[1].stats

        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(one)(jnp.arange(TASKS)))

    state = start(FROZEN)
    for step in range(2):
        seen.append(gathered(state.train.params, step))
        state = fitting.fit(frozen_loop, state, None, num_steps=step + 1)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *seen)
    tiny.assert_close(state.train.carry.stats, expected, rtol=1e-4)
    tiny.assert_equal(state.train.params.learner.stats, state.train.carry.stats)
    assert state.train.carry.num_steps == 2


# meta-training adapts with batch statistics, where frozen meta-test uses the averages
FROZEN_BATCH = algorithms.fomaml(tiny.norm_net(), 0.1, num_steps=1)


def test_several_steps_a_call_are_the_same_steps(toy_loop):
    one = fitting.fit(toy_loop, start(toy()), None, num_steps=4)
    three = fitting.fit(
        make_loop(toy(), steps_per_call=2),
        start(toy()),
        None,
        num_steps=4,
        steps_per_call=2,
        report_every=2,
    )
    tiny.assert_close(three.train, one.train, rtol=1e-6)


def test_chunks_of_tasks_give_the_gradient_of_the_whole():
    """On the gradient itself, which Adam would hide: SGD of rate 1 moves by it."""
    episodes = tiny.episodes(TASKS)
    results = []
    for chunk in (None, 2, 1):
        step = meta_step.make_train_step(toy(), optax.sgd(1.0), accumulate_tasks=chunk)
        state = start(toy(), optax.sgd(1.0)).train
        results.append(step(state, episodes))
    for result in results[1:]:
        tiny.assert_close(result, results[0], rtol=1e-6)
    assert results[0][1]["grad_norm"] > 0.1


MESH_SCRIPT = """
import jax, optax, tiny
import test_training as t
from metalstm.meta import step as meta_step
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("task",))
episodes = tiny.episodes(4)
sgd = optax.sgd(1.0)
for algorithm, chunks in (
    (t.FROZEN, None),
    (t.FROZEN, 1),
    (t.per_task_algorithm(), 1),
    (t.gates_algorithm(), None),
):
    results = []
    for options in ({}, {"mesh": mesh, "accumulate_tasks": chunks}):
        step = meta_step.make_train_step(algorithm, sgd, **options)
        state = meta_step.init_train_state(algorithm, sgd, 0, t.EPISODE)
        results.append(jax.device_get(step(state, episodes)))
    one, two = results
    if algorithm is t.FROZEN and chunks:  # the running average takes a step a chunk
        one, two = one[0].params, two[0].params
    else:
        assert one[1]["grad_norm"] > 0.01
    tiny.assert_close(two, one, rtol=1e-4, atol=1e-6)
state = meta_step.init_train_state(algorithm, sgd, 0, t.EPISODE)
program = step.lower(state, episodes).compile().as_text()
assert "all-reduce" in program
assert "all-gather" not in program
"""


def per_task_algorithm():
    """Each task counts in a number of its own, and the gradient reads it."""

    def meta_gradient(params, carry, keys, episodes):
        seen = carry + episodes.query.x.mean((1, 2))
        grads = {"w": params["w"] * (seen**2).mean()}
        return grads, seen, {"loss": seen.mean()}

    return toy(
        meta_gradient=meta_gradient,
        init_carry=lambda key, params, episode: jnp.arange(1.0, 1 + TASKS),
        per_task_carry=True,
    )


def gates_algorithm():
    """A rule whose state is a scan carry that starts from zeros."""
    rule = rules.lstm_gates(hidden_size=1, input_bias=(-1.0, 0.0))
    return algorithms.published_meta_lstm(
        tiny.tanh_net(), rule, num_steps=1, gradient_scale=1.0
    )


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_get_the_carry_of_their_own_tasks(chunk):
    sgd, results = optax.sgd(1.0), []
    for option in (None, chunk):
        algorithm = per_task_algorithm()
        step = meta_step.make_train_step(algorithm, sgd, accumulate_tasks=option)
        state = meta_step.init_train_state(algorithm, sgd, 0, EPISODE)
        for seed in range(2):
            state, metrics = step(state, tiny.episodes(TASKS, queries=1 + seed))
        results.append((state, metrics))
    tiny.assert_close(results[1], results[0], rtol=1e-6)
    assert np.ptp(results[0][0].carry) > 2


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    "algorithm",
    [
        algorithms.prototypical(tiny.norm_net()),
        algorithms.reptile(tiny.tanh_net(), rule_state="continued", num_steps=2),
    ],
    ids=["averages", "continued"],
)
def test_chunks_leave_the_carry_of_all_tasks_together(algorithm, chunk):
    """Batch statistics, and the state of Reptile's rule."""
    sgd, results = optax.sgd(0.1), []
    for option in (None, chunk):
        step = meta_step.make_train_step(algorithm, sgd, accumulate_tasks=option)
        state = meta_step.init_train_state(algorithm, sgd, 0, EPISODE)
        for _ in range(2):
            state, _ = step(state, tiny.episodes(TASKS))
        results.append(state)
    tiny.assert_close(results[1], results[0], rtol=1e-4)


def test_two_devices_give_the_gradient_of_one():
    tests = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def breaking_at(step: int):
    """Its loss is NaN at that meta-step (counted from 1) and from then on."""

    def meta_gradient(params, carry, keys, episodes):
        loss = jnp.where(carry + 1 >= step, jnp.nan, 1.0)
        grads = jax.tree.map(jnp.ones_like, params)
        return grads, carry + 1, {"loss": loss}

    return toy(meta_gradient=meta_gradient, init_carry=lambda key, p, e: jnp.int32(0))


@pytest.mark.parametrize("report_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_state(report_every):
    algorithm = breaking_at(3)
    loop, saved = make_loop(algorithm), []
    good = fitting.fit(loop, start(algorithm), None, num_steps=2)
    with pytest.raises(
        fitting.NonFiniteLossError, match=r"not finite at step 3 \(loss nan\).*lower"
    ) as error:
        fitting.fit(
            loop,
            start(algorithm),
            None,
            num_steps=8,
            report_every=report_every,
            save=lambda state: saved.append(copied(state)),
        )
    assert error.value.step == 3
    assert len(saved) == 1
    tiny.assert_equal(saved[0].train, copied(good.train))


def test_a_gradient_that_is_not_finite_stops_too():
    def meta_gradient(params, carry, keys, episodes):
        grads = jax.tree.map(lambda leaf: leaf / 0.0, params)
        return grads, carry, {"loss": jnp.float32(1)}

    algorithm = toy(meta_gradient=meta_gradient)
    with pytest.raises(fitting.NonFiniteLossError, match="step 1"):
        fitting.fit(make_loop(algorithm), start(algorithm), None, num_steps=1)


def test_the_best_on_validation_is_kept(toy_loop):
    scores = iter([0.5, 0.9, 0.7, float("nan")])
    seen = []

    def validate(params):
        seen.append(copied(params))
        return next(scores)

    end = fitting.fit(
        toy_loop, start(toy()), None, num_steps=8, validate=validate, validate_every=2
    )
    assert end.best_step == 4
    assert end.best_score == np.float32(0.9)
    tiny.assert_equal(copied(end.best_params), seen[1])
    tiny.assert_equal(copied(end.train.params), seen[3])
    assert tiny.max_difference(seen[1], seen[3]) > 0


def test_reports_are_means_since_the_last_and_cadences_count_absolute_steps(toy_loop):
    reports, singles, saves = [], [], []
    common = {"num_steps": 5}
    fitting.fit(
        toy_loop,
        start(toy()),
        None,
        report=lambda step, means: singles.append(means["loss"]),
        **common,
    )
    part = fitting.fit(toy_loop, start(toy()), None, num_steps=1, report_every=0)
    fitting.fit(
        toy_loop,
        part,
        None,
        report=lambda step, means: reports.append((step, means)),
        report_every=2,
        save=lambda state: saves.append(int(state.train.step)),
        save_every=4,
        **common,
    )
    assert [step for step, _ in reports] == [2, 4, 5]
    assert saves == [4, 5]
    np.testing.assert_allclose(reports[1][1]["loss"], np.mean(singles[2:4]), rtol=1e-6)
    assert set(reports[0][1]) == {"loss", "noise", "grad_norm"}


def test_time_runs_out_after_a_step_that_is_validated_and_saved(toy_loop):
    saves = []
    end = fitting.fit(
        toy_loop,
        start(toy()),
        None,
        num_steps=100,
        max_seconds=0,
        validate=lambda params: 1.0,
        save=lambda state: saves.append(state),
    )
    assert end.train.step == 1
    assert end.best_step == 1
    assert len(saves) == 1


def test_what_an_algorithm_overrides_is_what_the_trainer_uses():
    """Own gradient, a carry that is absorbed, another task in meta-training."""
    shapes = []

    def meta_gradient(params, carry, keys, episodes):
        shapes.append(episodes.query.x.shape)
        noise = jax.vmap(jax.random.uniform)(keys)
        metrics = {"loss": noise.mean(), "spread": noise.std()}
        return jax.tree.map(jnp.ones_like, params), carry + 2, metrics

    algorithm = toy(
        loss=None,
        meta_gradient=meta_gradient,
        init_carry=lambda key, params, episode: params["w"][0] * 0 + 5,
        absorb=lambda params, carry: params | {"w": params["w"].at[0].set(carry)},
        train_sampler=lambda spec: ClusterSpec(2, 1, 7, dim=tiny.FEATURES),
    )
    optimizer = optax.sgd(0.5)
    before = start(algorithm, optimizer)
    w = np.array(before.train.params["w"])
    loop = make_loop(algorithm, optimizer)
    reports = []
    end = fitting.fit(
        loop,
        before,
        None,
        num_steps=2,
        report=lambda step, means: reports.append(means),
    )
    assert end.train.carry == 9
    assert reports[0]["loss"] != reports[1]["loss"]  # every step, every task: its key
    assert reports[0]["spread"] > 0.01
    np.testing.assert_allclose(end.train.params["w"], [9, *(w[1:] - 1)], rtol=1e-6)
    assert shapes == [(TASKS, 14, tiny.FEATURES)]


def test_training_validating_and_training_again_compiles_each_program_once():
    algorithm = algorithms.fomaml(tiny.tanh_net(), 0.1, num_steps=1)
    loop = make_loop(algorithm)
    run = make_evaluate(algorithm, SPEC, batch_size=2)

    def validate(params):
        return run(params, None, num_episodes=4, split="validation").mean

    compiled = []
    state = start(algorithm)
    for rounds in range(3):
        if rounds == 1:
            jax.monitoring.register_event_duration_secs_listener(
                lambda event, seconds, **extra: (
                    compiled.append(event) if "backend_compile" in event else None
                )
            )
        state = fitting.fit(
            loop,
            state,
            None,
            num_steps=2 * (rounds + 1),
            validate=validate,
            validate_every=1,
        )
    assert loop._cache_size() == 1
    assert compiled == []


@pytest.mark.parametrize(
    "cadence", ["num_steps", "validate_every", "report_every", "save_every"]
)
def test_cadences_that_do_not_divide_are_refused(cadence):
    options = {"num_steps": 4, "report_every": 2} | {cadence: 3}
    with pytest.raises(
        ValueError, match=rf"{cadence}=3 is not a multiple of steps_per"
    ):
        fitting.fit(None, None, None, steps_per_call=2, **options)


@pytest.mark.fault("NaN, Inf and values that are no bytes")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_are_refused_before_training(value):
    pool = {"x": np.array([0.0, value, 1.0], np.float32), "y": np.array([0, 1, 2])}
    with pytest.raises(ValueError, match=r"pool\['x'\] holds 1 values that are NaN or"):
        fitting.fit(None, None, pool, num_steps=1)


@pytest.mark.parametrize("options", [{"num_tasks": 0}, {"steps_per_call": 0}])
def test_loops_of_nothing_are_refused(options):
    with pytest.raises(
        ValueError, match=r"(num_tasks|steps_per_call)=0: choose 1 or more"
    ):
        make_loop(toy(), **options)


def test_wrong_chunks_and_meshes_are_refused():
    sgd = optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"accumulate_tasks=0: choose 1 or more"):
        meta_step.make_train_step(toy(), sgd, accumulate_tasks=0)
    step = meta_step.make_train_step(toy(), sgd, accumulate_tasks=3)
    with pytest.raises(ValueError, match=r"accumulate_tasks=3 does not divide the 4 t"):
        step(start(toy(), sgd).train, tiny.episodes(4))
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match=r"mesh has axes \('data',\): one must be"):
        meta_step.make_train_step(toy(), sgd, mesh=mesh)


def test_a_large_array_of_the_host_is_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(fitting, "_PART", 4)
    pool = {"x": np.array([0.0] * 9 + [np.nan], np.float32), "none": np.zeros((0, 3))}
    with pytest.raises(ValueError, match=r"pool\['x'\] holds 1 values that are NaN or"):
        fitting.fit(None, None, pool, num_steps=1)
