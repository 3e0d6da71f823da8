"""Runs of drawn lengths, what their rule is told, and mixtures of families."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import rules
from metalstm.base import RuleTraits, UpdateRule
from metalstm.learned_optimizers import ProblemSampler, learned_optimizer, problems
from metalstm.meta import fitting, mixture
from metalstm.meta.step import adam_clipped

TASKS = 64
FAMILY = problems.quadratics(2)
RULE = rules.learned_sgd(0.01)


def build(rule=RULE, *, num_tasks=TASKS, unroll_steps=5, **options):
    """A step ``(carry, k) -> (grads, carry, metrics)`` and the carry it starts from."""
    algorithm = learned_optimizer(
        FAMILY, rule, num_tasks=num_tasks, unroll_steps=unroll_steps, **options
    )
    sampler = ProblemSampler(FAMILY, unroll_steps + 1)
    key = jax.random.key(0)
    draw = sampler.sample(key)
    params = algorithm.init(key, draw)
    carry = jax.tree.map(jnp.array, algorithm.init_carry(key, params, draw))

    def step(carry, k):
        keys = jax.random.split(jax.random.fold_in(key, k), num_tasks)
        return algorithm.meta_gradient(
            params, carry, keys, jax.vmap(sampler.sample)(keys)
        )

    return tiny.quick_jit(step), carry


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_lengths_are_log_uniform_and_fixed_when_a_run_starts(estimator):
    step, carry = build(horizon=(8, 200), estimator=estimator)
    drawn = []
    for k in range(60):
        before = carry
        _, carry, _ = step(carry, k)
        started = np.asarray(carry.inner_step == 5)
        if k:
            over = np.asarray(before.inner_step >= before.length)
            np.testing.assert_array_equal(started, over)
        kept = ~started
        np.testing.assert_array_equal(carry.length[kept], before.length[kept])
        drawn += np.asarray(carry.length)[started].tolist()
    lengths = np.array(drawn)
    assert np.all(lengths % 5 == 0)  # the next multiple of a segment
    assert 10 <= lengths.min() <= 20 < 150 < lengths.max() <= 200
    first = lengths[:TASKS]  # later ones are mostly short, as these end more often
    assert abs(np.log(first).mean() - np.log([8, 200]).mean()) < 0.35


def test_staggered_runs_are_first_a_share_of_their_length():
    step, carry = build(num_tasks=8, horizon=(200, 200), stagger=True)
    assert carry.length.tolist() == [25, 50, 75, 100, 125, 150, 175, 200]
    _, after, _ = step(carry, 0)
    assert after.inner_step.tolist() == [5] * 8
    np.testing.assert_array_equal(after.length, carry.length)
    for k in range(1, 6):
        _, after, _ = step(after, k)
    assert after.length.tolist() == [200, *carry.length.tolist()[1:]]


def probe() -> UpdateRule:
    """Moves every parameter to its progress, as the loss then shows."""

    def update(updates, state, params=None, *, progress=jnp.nan, **extra):
        move = jax.tree.map(lambda p: progress - p, params)
        return move, jnp.full((), progress)

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    return UpdateRule(lambda key, params: jnp.float32(0), lambda rule: tx, RuleTraits())


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_a_share_of_the_runs_is_told_its_progress(estimator):
    step, carry = build(
        probe(), horizon=(8, 200), tell_progress=0.75, stagger=True, estimator=estimator
    )
    for k in range(3):
        _, carry, _ = step(carry, k)
        seen = np.asarray(carry.rule_state.inner).reshape(TASKS, -1)
        told = np.asarray(carry.rule_state.num_steps).reshape(TASKS, -1) > 0
        share = (carry.inner_step - 1) / carry.length
        wanted = np.where(told, np.asarray(share)[:, None], -1)
        np.testing.assert_allclose(seen, wanted, rtol=1e-5)
        assert np.all(told.min(1) == told.max(1))  # both signs of a pair alike
        assert 0.55 < told.mean() < 0.95


def test_the_log_of_a_relative_loss_has_a_floor():
    """At the optimum it is log 0.001; the derivative is finite there."""

    def bind(w):
        to_zero = lambda g, params: jax.tree.map(lambda p: -w * p, params)  # noqa: E731
        return optax.with_extra_args_support(optax.stateless(to_zero))

    rule = UpdateRule(lambda key, params: jnp.float32(1), bind)
    family = FAMILY._replace(
        loss=lambda params, task, batch: jnp.square(params["theta"]).sum()
    )
    algorithm = learned_optimizer(
        family, rule, num_tasks=1, unroll_steps=1, horizon=1,
        loss_transform="log_relative",
    )  # fmt: skip
    sampler = ProblemSampler(family, 2)
    key = jax.random.key(0)
    draw = sampler.sample(key)
    params = algorithm.init(key, draw)
    carry = algorithm.init_carry(key, params, draw)
    draws = jax.tree.map(lambda leaf: leaf[None], draw)
    grads, _, metrics = algorithm.meta_gradient(params, carry, key[None], draws)
    np.testing.assert_allclose(metrics["loss"], np.log(1e-3), rtol=1e-5)
    assert np.isfinite(grads)


@pytest.mark.parametrize("layout", ["vmap", "stacked"])
def test_a_derivative_that_overflows_counts_as_nothing(layout):
    """The losses are finite, their derivative is not: the tasks start again."""

    def update(w, updates, params):
        # the derivative of a root at zero is infinite
        return jax.tree.map(lambda g, p: 0 * g + jnp.sqrt(0 * w) * p, updates, params)

    def bind(w):
        tx = optax.stateless(functools.partial(update, w))
        return optax.with_extra_args_support(tx)

    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    rule = UpdateRule(lambda key, params: jnp.float32(1), bind, traits)
    step, carry = build(rule, num_tasks=2, horizon=10, task_mapping=layout)
    grads, carry, metrics = step(carry, 0)
    assert grads == 0
    assert metrics["diverged"] == 1
    assert carry.inner_step.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": (0, 5)}, r"horizon=\(0, 5\): give 1 <= low <= high"),
        ({"horizon": (9, 5)}, r"horizon=\(9, 5\): give 1 <= low <= high"),
        ({"tell_progress": 1.5}, r"tell_progress=1.5: choose a number in \(0, 1\]"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learned_optimizer(FAMILY, RULE, num_tasks=1, **options)


# -- mixtures --------------------------------------------------------------------------


@functools.cache
def parts() -> tuple[mixture.MixturePart, ...]:
    """Two families of different shapes, and two estimators on the first."""
    out = []
    rule = rules.moment_gates(hidden_size=2)
    for dim, estimator, weight in ((2, "pes", 1), (2, "backprop", 1), (3, "pes", 2)):
        family = problems.quadratics(dim)
        algorithm = learned_optimizer(
            family,
            rule,
            num_tasks=4,
            unroll_steps=2,
            horizon=(4, 12),
            estimator=estimator,
            tell_progress=0.5,
            stagger=True,
            task_mapping="vmap",
        )
        sampler = ProblemSampler(family, 1)
        out.append(mixture.MixturePart(algorithm, sampler, 4, weight))
    return tuple(out)


OPTIMIZER = adam_clipped(0.01, 1.0)
POOLS = ((), (), ())


def test_a_step_is_of_one_part_and_leaves_the_others_runs():
    state = mixture.init_mixture_state(parts(), OPTIMIZER, 0, POOLS)
    loop = mixture.make_mixture_loop(parts(), OPTIMIZER)
    weights = [part.weight for part in parts()]
    for step in range(12):
        before = jax.device_get(state)
        state, metrics = loop(state, POOLS)
        changed = [
            tiny.max_difference(a.params, b.params) > 0
            for a, b in zip(before.carry, state.carry, strict=True)
        ]
        chosen = mixture.part_of_step(weights, 0, step)
        assert changed == [k == chosen for k in range(3)]
        assert tiny.max_difference(before.params, state.params) > 0
        assert metrics["finite"].all()
    assert state.step == 12


def test_no_program_is_compiled_twice_for_a_weak_type():
    """A carry's first types are those of every later one."""
    state = mixture.init_mixture_state(parts(), OPTIMIZER, 0, POOLS)
    assert not [leaf for leaf in jax.tree.leaves(state) if jax.typeof(leaf).weak_type]


def test_parts_are_drawn_by_their_weights():
    drawn = [mixture.part_of_step([1, 1, 2], 0, step) for step in range(2_000)]
    shares = np.bincount(drawn) / len(drawn)
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.04)
    assert drawn[:20] != [mixture.part_of_step([1, 1, 2], 1, s) for s in range(20)]


def test_a_mixture_trains_with_fit_and_resumes_to_the_bit():
    loop = mixture.make_mixture_loop(parts(), OPTIMIZER)
    start = lambda: fitting.init_fit_state(  # noqa: E731
        mixture.init_mixture_state(parts(), OPTIMIZER, 0, POOLS)
    )
    whole = fitting.fit(loop, start(), POOLS, num_steps=10)
    half = fitting.fit(loop, start(), POOLS, num_steps=4)
    kept = jax.tree.map(jnp.array, half)
    again = mixture.make_mixture_loop(parts(), OPTIMIZER)  # as another process would
    resumed = fitting.fit(again, kept, POOLS, num_steps=10)
    tiny.assert_equal(resumed.train, whole.train)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"len\(parts\)=0: choose 1 or more"):
        mixture.make_mixture_loop((), OPTIMIZER)
    wrong = parts()[0]._replace(weight=0.0)
    with pytest.raises(ValueError, match=r"weight=0.0: choose a number above 0"):
        mixture.make_mixture_loop((wrong,), OPTIMIZER)
