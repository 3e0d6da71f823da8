"""Meta-training of optimizers: gradients, persistence, layouts, evolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax import lax

from metalstm import inner, rules
from metalstm.algorithms import learned_init
from metalstm.learned_optimizers import learned_optimizer, problems
from metalstm.learned_optimizers.problems import Draw, ProblemFamily, ProblemSampler
from metalstm.meta import step as meta_step

TASKS = 3
RULE = rules.l2l(hidden_size=2, num_layers=1, features="raw")


def small_family() -> ProblemFamily:
    """Two leaves, a task and minibatches: sum (w v - 1 + batch)^2 + 0.1."""

    def loss(params, task, batch):
        v = jnp.append(params["a"], params["b"])
        return jnp.square(task * v - 1 + batch).sum() + 0.1

    return ProblemFamily(
        sample=lambda key, data: jax.random.normal(key, (3,)),
        init=lambda key, task: {
            "a": jax.random.normal(key, (2,)),
            "b": jax.random.normal(jax.random.fold_in(key, 1)),
        },
        batch=lambda key, data, size=None: 0.3 * jax.random.normal(key, (3,)),
        loss=loss,
    )


FAMILY = small_family()


def draw_many(num_steps: int, seed: int = 0, num_tasks: int = TASKS) -> Draw:
    """[T] problems with the batches of one segment."""
    sampler = ProblemSampler(FAMILY, num_steps + 1)
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    return jax.vmap(lambda key: sampler.sample(key, None))(keys)


def build(rule=RULE, *, seed: int = 0, num_tasks: int = TASKS, **options):
    """The meta-gradient, jitted, with meta-parameters and the carry it starts from."""
    algorithm = learned_optimizer(FAMILY, rule, num_tasks=num_tasks, **options)
    one = jax.tree.map(lambda leaf: leaf[0], draw_many(options["unroll_steps"]))
    key = jax.random.key(seed)
    meta_params = jax.tree.map(lambda w: 1.0 * w, algorithm.init(key, one))
    carry = algorithm.init_carry(key, meta_params, one)
    return tiny.quick_jit(algorithm.meta_gradient), meta_params, carry


def keys_of(step: int, num_tasks: int = TASKS):
    return jax.random.split(jax.random.key(100 + step), num_tasks)


def by_hand(rule_params, params, state, task, batches, num_steps, second_order):
    """Losses at theta_1 .. theta_K, and where it ends: a loop over optax updates."""
    tx, losses = RULE.bind(rule_params), []
    for t in range(num_steps):
        grads = jax.grad(FAMILY.loss)(params, task, batches[t])
        if not second_order:
            grads = lax.stop_gradient(grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(FAMILY.loss(params, task, batches[t + 1]))
    return jnp.stack(losses), params, state


WEIGHTS = np.array([1.0, 4.0, 9.0, 16.0])


def expected_gradients(rule_params, draws):
    """Of each kind of objective over a horizon of 4, in first and in second order.

    From the derivative of every loss, by forward mode, and the chain rule by hand.
    """

    def losses_of(rule_params, draw, second_order):
        state = RULE.bind(rule_params).init(draw.params)
        losses, _, _ = by_hand(
            rule_params, draw.params, state, draw.task, draw.batches, 4, second_order
        )
        return losses

    def of_tasks(rule_params, second_order):
        return jax.vmap(lambda d: losses_of(rule_params, d, second_order))(draws)

    first = jax.vmap(FAMILY.loss)(draws.params, draws.task, draws.batches[:, 0])
    out = {}
    for second_order in (False, True):
        fn = lambda p: of_tasks(p, second_order)  # noqa: B023, E731 (used at once)
        losses, slopes = tiny.quick_jit(lambda p: (fn(p), jax.jacfwd(fn)(p)))(  # noqa: B023
            rule_params
        )
        scale = np.asarray(first)[:, None]
        for kind, value, by_loss in (
            ("none", losses, np.ones_like(losses)),
            ("log", np.log(losses), 1 / losses),
            ("relative", losses / scale, np.ones_like(losses) / scale),
            ("weights", losses * WEIGHTS, np.ones_like(losses) * WEIGHTS),
        ):
            grads = jax.tree.map(
                lambda j: np.tensordot(by_loss, j, 2) / losses.size,  # noqa: B023
                slopes,
            )
            out[kind, second_order] = value.mean(), grads
    return out


@pytest.fixture(scope="module")
def expected():
    _, meta_params, _ = build(unroll_steps=4, horizon=4)
    return expected_gradients(meta_params, draw_many(4))


def assert_gradient(result, expected):
    (grads, _, metrics), (value, wanted) = result, expected
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    tiny.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)
    assert tiny.max_difference(grads, jax.tree.map(jnp.zeros_like, grads)) > 1e-3


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("kind", ["none", "log", "relative", "weights"])
def test_a_segment_of_the_whole_horizon_is_full_backpropagation(
    expected, kind, second_order
):
    """Against a loop over optax updates that is differentiated as it stands."""
    options = {"weights": lambda done: (4 * done) ** 2} if kind == "weights" else {}
    if kind in ("log", "relative"):
        options = {"loss_transform": kind}
    how = inner.second_order() if second_order else inner.first_order("mixed")
    fn, meta_params, carry = build(
        unroll_steps=4, horizon=4, differentiation=how, **options
    )
    result = fn(meta_params, carry, keys_of(0), draw_many(4))
    assert_gradient(result, expected[kind, second_order])
    first, second = expected[kind, False][1], expected[kind, True][1]
    assert tiny.max_difference(first, second) > 1e-3


@pytest.mark.parametrize("layout", ["vmap", "scan", "unroll"])
def test_layouts_and_what_is_kept_change_no_gradient(expected, layout):
    fn, meta_params, carry = build(
        unroll_steps=4,
        horizon=4,
        task_mapping=layout,
        differentiation=inner.first_order("segments" if layout == "scan" else "all"),
    )
    result = fn(meta_params, carry, keys_of(0), draw_many(4))
    assert_gradient(result, expected["none", False])


def test_stacked_tasks_are_the_tasks_one_by_one():
    """The carry too, over segments that restart at different times."""
    options = {"unroll_steps": 2, "horizon": 6, "stagger": True}
    options |= {"loss_transform": "relative", "weights": lambda done: done}
    stacked, meta_params, carry = build(**options, task_mapping="stacked")
    mapped, _, other = build(**options, task_mapping="vmap")
    for step in range(4):
        draws = draw_many(2, seed=step)
        grads, carry, metrics = stacked(meta_params, carry, keys_of(step), draws)
        results = mapped(meta_params, other, keys_of(step), draws)
        other = results[1]
        tiny.assert_close((grads, carry, metrics), results, rtol=1e-4, atol=1e-6)
        assert tiny.max_difference(grads, jax.tree.map(jnp.zeros_like, grads)) > 1e-3
    assert len(set(carry.inner_step.tolist())) == TASKS


def test_what_is_stacked_is_one_matrix_product_for_all_tasks():
    def widest_dot(layout):
        fn, meta_params, carry = build(
            unroll_steps=2,
            horizon=2,
            task_mapping=layout,
            differentiation=inner.first_order(),
        )
        text = str(fn.trace(meta_params, carry, keys_of(0), draw_many(2)).jaxpr)
        return "f32[9,8] = dot_general" in text  # [T N, 4 H], so few are they

    assert widest_dot("stacked")
    assert widest_dot(None)
    assert not widest_dot("vmap")


def test_training_goes_on_over_segments_and_starts_again_at_the_horizon():
    """Two segments of 2 are 4 updates; the second's gradient starts at theta_2."""
    fn, meta_params, carry = build(unroll_steps=2, horizon=4)
    draws = [draw_many(2, seed=step) for step in range(3)]
    results = []
    for step in range(3):
        results.append(fn(meta_params, carry, keys_of(step), draws[step]))
        carry = results[-1][1]
        assert carry.inner_step.tolist() == [[2, 4, 2][step]] * TASKS
        assert carry.meta_step.tolist() == [step + 1] * TASKS
    tx = RULE.bind(meta_params)

    def second_segment(rule_params, draw, after):
        state = tx.init(draw.params)
        _, params, state = by_hand(
            meta_params, draw.params, state, draw.task, draw.batches, 2, False
        )
        losses, params, state = by_hand(
            rule_params, params, state, draw.task, after, 2, False
        )
        return losses.mean(), (params, state)

    @tiny.quick_jit
    def wanted(first, after):
        grads, ends = jax.vmap(
            jax.grad(second_segment, has_aux=True), in_axes=(None, 0, 0)
        )(meta_params, first, after)
        return jax.tree.map(lambda g: g.mean(0), grads), ends

    grads, (params, state) = wanted(draws[0], draws[1].batches)
    tiny.assert_close(results[1][0], grads, rtol=1e-4, atol=1e-6)
    tiny.assert_close(results[1][1].params, params)
    tiny.assert_close(results[1][1].rule_state, state)
    tiny.assert_equal(results[1][1].task, draws[0].task)
    at_start = jax.vmap(FAMILY.loss)(
        draws[0].params, draws[0].task, draws[0].batches[:, 0]
    )
    tiny.assert_close(results[1][1].first_loss, at_start)
    # then from the new draw, as a run that knows nothing of before
    tiny.assert_equal(results[2][1].task, draws[2].task)
    fresh = fn(meta_params, build(unroll_steps=2, horizon=4)[2], keys_of(2), draws[2])
    tiny.assert_close(results[2][0], fresh[0])
    tiny.assert_close(results[2][1].params, fresh[1].params)
    tiny.assert_close(results[2][1].first_loss, fresh[1].first_loss)


def test_a_curriculum_lengthens_the_horizon_and_compiles_once():
    fn, meta_params, carry = build(
        unroll_steps=1, horizon=lambda step: jnp.where(step < 3, 1, 3)
    )
    seen = []
    for step in range(8):
        _, carry, _ = fn(meta_params, carry, keys_of(step), draw_many(1, seed=step))
        seen.append(int(carry.inner_step[0]))
    # a run's length is fixed when it starts
    assert seen == [1, 1, 1, 1, 2, 3, 1, 2]
    assert fn._cache_size() == 1


def test_staggered_tasks_are_at_all_phases():
    fn, meta_params, carry = build(unroll_steps=1, horizon=3, stagger=True)
    seen = []
    for step in range(4):
        _, carry, _ = fn(meta_params, carry, keys_of(step), draw_many(1, seed=step))
        seen.append(carry.inner_step.tolist())
    # first runs of 1, 2 and 3 updates
    assert seen == [[1, 1, 1], [1, 2, 2], [2, 1, 3], [3, 2, 1]]


def test_a_task_that_diverges_spoils_nothing_and_starts_again():
    """Its loss counts as 1e12 and has no gradient; the others' is what it was."""
    rule = rules.learned_sgd(0.1)
    fn, meta_params, carry = build(
        rule, unroll_steps=2, horizon=6, task_mapping="vmap", loss_transform="log"
    )
    draws = draw_many(2)
    broken = draws._replace(task=draws.task.at[1].multiply(1e9))
    grads, after, metrics = fn(meta_params, carry, keys_of(0), broken)
    others = jax.tree.map(lambda x: x[jnp.array([0, 2])], draws)
    alone_fn, _, alone_carry = build(
        rule, num_tasks=2, unroll_steps=2, horizon=6, loss_transform="log"
    )
    alone, _, _ = alone_fn(meta_params, alone_carry, keys_of(0)[:2], others)
    np.testing.assert_allclose(grads, alone * 2 / 3, rtol=1e-5)
    assert after.inner_step.tolist() == [2, -1, 2]
    np.testing.assert_allclose(metrics["diverged"], 1 / 3, rtol=1e-6)
    _, after, metrics = fn(meta_params, after, keys_of(1), draw_many(2, seed=1))
    assert after.inner_step.tolist() == [4, 2, 4]
    assert metrics["diverged"] == 0


def test_a_rule_with_a_shared_counter_is_stacked_in_lockstep_only():
    """learned_sgd counts its steps in one number for all tasks."""
    rule = rules.learned_sgd((0.01, 0.2), num_steps=4)
    options = {"unroll_steps": 2, "horizon": 4}
    stacked, meta_params, carry = build(rule, **options, task_mapping="stacked")
    mapped, _, other = build(rule, **options, task_mapping="vmap")
    for step in range(3):
        args = keys_of(step), draw_many(2, seed=step)
        grads, carry, _ = stacked(meta_params, carry, *args)
        wanted, other, _ = mapped(meta_params, other, *args)
        tiny.assert_close((grads, carry), (wanted, other), rtol=1e-4)
        used = [0, 1] if step != 1 else [2, 3]
        assert set(np.flatnonzero(grads)) == set(used)
    fn, meta_params, carry = build(
        rule, **options, task_mapping="stacked", stagger=True
    )
    with pytest.raises(ValueError, match=r"tasks that start at different times share"):
        fn(meta_params, carry, keys_of(0), draw_many(2))


PES = {"unroll_steps": 1, "horizon": 4, "estimator": "pes", "pes_std": 0.001}


def test_evolution_is_unbiased_where_truncation_is_not():
    """One rate, a horizon of 4 in segments of 1, 40 x 200 pairs on one instance.

    The truth is the derivative of the sum of the segments' objectives. Both estimators
    are summed over the segments of a horizon, at fixed meta-parameters.
    """
    rule, num_pairs, repeats = rules.learned_sgd(0.03), 200, 40
    one = jax.tree.map(lambda leaf: leaf[0], draw_many(1, seed=5))
    batches = [draw_many(1, seed=seed).batches[0, 0] for seed in range(5)]

    def draws_of(t, num):
        draw = one._replace(batches=jnp.stack(batches[t : t + 2]))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), draw)

    def truth(rate):
        params, total = one.params, 0.0
        for t in range(4):
            grads = jax.grad(FAMILY.loss)(params, one.task, batches[t])
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
            total += FAMILY.loss(params, one.task, batches[t + 1])
        return total

    def summed(num_tasks, **options):
        algorithm = learned_optimizer(FAMILY, rule, num_tasks=num_tasks, **options)

        def run(key, rate):
            carry, total = algorithm.init_carry(key, rate, one), 0.0
            for t in range(4):
                keys = jax.random.split(jax.random.fold_in(key, t), num_tasks)
                grads, carry, _ = algorithm.meta_gradient(
                    rate, carry, keys, draws_of(t, num_tasks)
                )
                total += grads
            return total

        return run

    rate = jnp.float32(0.03)
    keys = jax.random.split(jax.random.key(0), repeats)
    evolved = tiny.quick_jit(jax.vmap(summed(num_pairs, **PES), in_axes=(0, None)))
    estimates = np.asarray(evolved(keys, rate), np.float64)
    mean, error = estimates.mean(), estimates.std(ddof=1) / repeats**0.5
    exact = float(jax.grad(truth)(rate))
    truncated = summed(
        1, unroll_steps=1, horizon=4, differentiation=inner.second_order()
    )
    cut = float(tiny.quick_jit(truncated)(keys[0], rate))
    assert abs(mean - exact) < 3 * error, (mean, error, exact, cut)
    assert error < 0.03 * abs(exact)
    assert abs(cut - exact) > 10 * error, (mean, error, exact, cut)


def test_evolution_adds_up_what_it_did_and_forgets_it_with_the_task():
    fn, meta_params, carry = build(**PES | {"horizon": 2})
    shifts = []
    for step in range(3):
        grads, carry, _ = fn(meta_params, carry, keys_of(step), draw_many(1, seed=step))
        shifts.append(carry.shift["output"]["kernel"])
        assert np.isfinite(tiny.max_difference(grads, meta_params))
    noise = np.asarray(jnp.stack([shifts[0], shifts[1] - shifts[0], shifts[2]]))
    assert np.abs(noise).max() < 0.006
    assert 0.0005 < noise.std() < 0.002
    # each task, each segment its own
    assert len(np.unique(noise.round(8))) == noise.size
    assert carry.params["a"].shape == (TASKS, 2, 2)


def test_evolution_says_nothing_of_a_pair_that_diverged():
    fn, meta_params, carry = build(**PES)
    draws = draw_many(1)
    broken = draws._replace(task=draws.task.at[1].set(jnp.nan))
    grads, after, metrics = fn(meta_params, carry, keys_of(0), broken)
    assert tiny.max_difference(grads, jax.tree.map(jnp.zeros_like, grads)) < 1e3
    assert after.inner_step.tolist() == [1, -1, 1]
    assert np.isfinite(metrics["loss"])


def test_the_trainer_learns_to_optimize():
    """Through make_train_loop; the sampler's batches are set by the algorithm."""
    family = problems.quadratics(2)
    rule = rules.l2l(hidden_size=4, num_layers=1)
    algorithm = learned_optimizer(
        family, rule, num_tasks=8, unroll_steps=5, horizon=10, loss_transform="log"
    )
    sampler, adam = ProblemSampler(family, 1), optax.adam(0.01)
    loop = meta_step.make_train_loop(
        algorithm, adam, sampler, num_tasks=8, steps_per_call=30
    )
    state = meta_step.init_train_state(
        algorithm, adam, 0, sampler.sample(jax.random.key(0))
    )
    losses = []
    for _ in range(10):
        state, metrics = loop(state, None)
        losses.append(metrics["inner_loss"].mean())
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert set(metrics) == {
        "loss",
        "inner_loss",
        "diverged",
        "above_start",
        "grad_norm",
        "finite",
    }


def test_a_carry_is_split_with_its_tasks():
    """Chunk by chunk = all at once: the carry, and the gradient."""
    sgd = optax.sgd(1.0)
    algorithm = learned_optimizer(
        FAMILY, RULE, num_tasks=4, unroll_steps=1, horizon=2, stagger=True
    )
    one = jax.tree.map(lambda leaf: leaf[0], draw_many(1))
    results = []
    for chunk in (None, 2):
        step = meta_step.make_train_step(algorithm, sgd, accumulate_tasks=chunk)
        state = meta_step.init_train_state(algorithm, sgd, 0, one)
        for seed in range(2):
            state, metrics = step(state, draw_many(1, seed, num_tasks=4))
        results.append((state, metrics))
    tiny.assert_close(results[1], results[0], rtol=1e-4)
    assert results[0][1]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, r"num_tasks=0: choose 1 or more"),
        ({"unroll_steps": 0}, r"unroll_steps=0: choose 1 or more"),
        ({"horizon": 30}, r"horizon=30 is not a multiple of unroll_steps=20"),
        ({"horizon": 0}, r"horizon=0 is not a multiple of unroll_steps=20"),
        ({"loss_transform": "x"}, r"loss_transform='x': choose one of none, log"),
        ({"estimator": "x"}, r"estimator='x': choose one of backprop, pes"),
        ({"pes_std": 0.0}, r"pes_std=0.0: choose a number above 0"),
        (
            {"estimator": "pes", "task_mapping": "stacked"},
            r"task_mapping='stacked' needs a coordinate-wise rule that does not read",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learned_optimizer(FAMILY, RULE, **{"num_tasks": 1} | options)


def test_rules_that_cannot_be_differentiated_twice_or_stacked_are_refused():
    adam = rules.tunable(optax.adam, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"second_order\(\), but the rule's deriv"):
        build(adam, unroll_steps=2, horizon=2, differentiation=inner.second_order())
    gates = rules.lstm_gates(hidden_size=1)
    with pytest.raises(ValueError, match=r"needs a coordinate-wise rule that does"):
        learned_optimizer(FAMILY, gates, num_tasks=1, task_mapping="stacked")


def test_wrong_draws_are_refused():
    fn, meta_params, carry = build(unroll_steps=2, horizon=2)
    with pytest.raises(ValueError, match=r"a draw has 2 batches but unroll_steps=2"):
        fn(meta_params, carry, keys_of(0), draw_many(1))
    algorithm = learned_optimizer(FAMILY, RULE, num_tasks=1)
    with pytest.raises(ValueError, match=r"draws problems of another family"):
        algorithm.train_sampler(ProblemSampler(problems.quadratics(), 1))
    assert algorithm.train_sampler(ProblemSampler(FAMILY, 1)).num_batches == 21


def test_an_optimizer_predicts_nothing():
    algorithm = learned_optimizer(FAMILY, RULE, num_tasks=1)
    with pytest.raises(ValueError, match=r"a learned optimizer predicts nothing: bind"):
        algorithm.predict((), None, None, None, num_classes=2)
    assert algorithm.per_task_carry
    assert not learned_init(
        tiny.tanh_net(), RULE, num_steps=1, differentiation=inner.first_order()
    ).per_task_carry


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_the_meta_gradient_is_of_its_parameters_type_under_x64(estimator):
    with jax.enable_x64(True):
        algorithm = learned_optimizer(
            family := problems.quadratics(2),
            rules.l2l(hidden_size=1),
            num_tasks=2,
            unroll_steps=2,
            estimator=estimator,
        )

        def step():
            sampler = ProblemSampler(family, 3)
            keys = jax.random.split(jax.random.key(0), 2)
            draws = jax.vmap(lambda key: sampler.sample(key, None))(keys)
            one = jax.tree.map(lambda leaf: leaf[0], draws)
            params = algorithm.init(keys[0], one)
            carry = algorithm.init_carry(keys[0], params, one)
            return params, algorithm.meta_gradient(params, carry, keys, draws)[0]

        params, grads = jax.eval_shape(step)
    types = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)  # noqa: E731
    assert types(grads) == types(params)
