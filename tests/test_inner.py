"""The inner loop: what each switch does to values and to derivatives."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from metalstm import nn, rules
from metalstm.base import Batch, Learner, LearnerState, RuleTraits, UpdateRule
from metalstm.inner import (
    Differentiation,
    coordinatewise,
    first_order,
    scanning,
    second_order,
    unroll,
)

STEPS = 4
SHAPES = {"a": (70, 61), "b": (33,)}  # 4,303 coordinates: blocks, and padding


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several blocks and a rest of these parameters, not one block of all."""
    usual, coordinatewise._BLOCK = coordinatewise._BLOCK, {False: 1024, True: 1024}
    yield
    coordinatewise._BLOCK = usual


RULES = {
    "gates": rules.lstm_gates(hidden_size=2),
    "sgd": rules.learned_sgd(0.3, num_steps=3),
}


def plain(rule: UpdateRule) -> UpdateRule:
    """The rule without its promise, whose derivative is the scan's."""
    return rule._replace(traits=rule.traits._replace(coordinatewise=False))


def make_weights(name: str):
    weights = RULES[name].init(jax.random.key(1), theta_0())
    if name == "gates":  # published weights hardly matter; f about 0.95, i about 0.3
        weights = jax.tree.map(lambda leaf: 30 * leaf, weights)
        weights["forget"]["bias"] = jnp.float32(3)
        weights["input"]["bias"] = jnp.float32(-1)
    if name == "sgd":
        weights = weights * jnp.array([1.0, 0.7, 0.9])
    return weights


def theta_0():
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {name: draw(shape) for name, shape in SHAPES.items()}


def loss_fn(params, stats, batch, key):
    """Smooth, not quadratic, and every coordinate counts; stats count the calls."""
    del key
    shift = 0.5 if batch is None else batch
    terms = jax.tree.map(lambda p: jnp.sum(jnp.cosh(0.7 * (p - shift))), params)
    return sum(jax.tree.leaves(terms)) / 5, stats + 1


@functools.cache
def outer_gradient(name: str = "gates", blocked: bool = False, **options):
    """(weights, theta, c, d) -> value of c.theta_T + d.losses and its gradients."""
    rule = RULES[name] if blocked else plain(RULES[name])
    how = first_order if options.pop("order") == "first" else second_order
    differentiation = how(**{"keep": "all"} | options)

    def objective(weights, theta, c, d):
        final, trace = unroll(
            loss_fn,
            rule,
            weights,
            theta,
            num_steps=STEPS,
            differentiation=differentiation,
            stats=jnp.float32(0),
        )
        dots = jax.tree.map(jnp.vdot, c, final.params)
        value = sum(jax.tree.leaves(dots)) + d @ trace.losses
        return value, (final.params, trace.losses)

    return tiny.quick_jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


def run(name="gates", *, c=True, d=None, **options):
    """Values and gradients with the given weights on theta_T and on the losses."""
    theta = theta_0()
    draw = lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape) / 50  # noqa: E731
    cotangent = jax.tree.map(lambda p: draw(p) * c, theta)
    d = jnp.zeros(STEPS) if d is None else jnp.asarray(d, jnp.float32)
    fn = outer_gradient(name, **options)
    (_, values), grads = fn(make_weights(name), theta, cotangent, d)
    return values, grads


def largest(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


FIRST = {"order": "first"}
SECOND = {"order": "second"}
BLOCKED = {"order": "first", "blocked": True}
KEEPS = ("all", "remat", "mixed", "segments")


@pytest.mark.parametrize("name", RULES)
def test_blocked_replay_equals_the_plain_path(name):
    """Values, and gradients by rule and theta_0, of theta_T and of the losses."""
    for weights in ({}, {"c": False, "d": [1, 2, -1, 0.5]}):
        plain_values, plain_grads = run(name, **FIRST, **weights)
        values, grads = run(name, **BLOCKED, **weights)
        tiny.assert_close(values, plain_values, rtol=1e-5, atol=1e-6)
        tiny.assert_close(grads, plain_grads, rtol=2e-4, atol=1e-5)
        assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads[1]))


def momentum(flat: bool) -> optax.GradientTransformationExtraArgs:
    """Its state is a counter and one vector, or a tree like the parameters."""

    def init(params):
        if flat:
            size = sum(p.size for p in jax.tree.leaves(params))
            return {"step": jnp.int32(0), "mean": jnp.zeros(size)}
        return {"step": jnp.int32(0), "mean": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, state, params, **extra):
        del extra
        vector, back = ravel_pytree(grads)
        mean = 0.9 * ravel_pytree(state["mean"])[0] + vector
        mean = mean - 0.1 * ravel_pytree(params)[0]
        new = {"step": state["step"] + 1, "mean": mean if flat else back(mean)}
        return back(-0.3 / new["step"] * mean), new

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("name", [*RULES, "flat", "tree"])
def test_blocked_replay_goes_on_from_a_given_state_as_from_a_constant(name):
    """Per-coordinate leaves are cut, others shared; what it cannot cut goes plain."""
    theta = theta_0()
    weights = make_weights(name) if name in RULES else ()

    rule = RULES.get(name) or rules.as_rule(
        momentum(name == "flat"), RuleTraits(coordinatewise=True)
    )

    def moved(leaf):  # away from where a fresh one is; a counter of 0 becomes 1
        wave = 0.3 + jnp.sin(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape)
        return (leaf + wave).astype(leaf.dtype)

    def objective(weights, theta, mean, start, blocked):
        start = jax.tree.map(lambda leaf: leaf + mean.astype(leaf.dtype), start)
        if not blocked:
            start = jax.lax.stop_gradient(start)
        final, trace = unroll(
            loss_fn,
            rule if blocked else plain(rule),
            weights,
            theta,
            num_steps=STEPS,
            differentiation=first_order(),
            stats=jnp.float32(0),
            rule_state=start,
        )
        dots = jax.tree.map(lambda p: jnp.vdot(jnp.cos(p), p), final.params)
        value = sum(jax.tree.leaves(dots)) + trace.losses[2]
        if blocked:  # a constant too
            inexact = jax.tree.map(lambda x: x * 1.0, final.rule_state)
            value += sum(leaf.sum() for leaf in jax.tree.leaves(inexact))
        return value, final

    init = rule.bind(weights).init
    start = jax.tree.map(moved, init(theta))
    fn = tiny.quick_jit(jax.grad(objective, (0, 1, 2), has_aux=True), static_argnums=4)
    args = (weights, theta, jnp.float32(0.1), start)
    plain_grads, expected = fn(*args, False)
    grads, final = fn(*args, True)
    scans = [str(fn.trace(*args, way).jaxpr).count("scan[") for way in (True, False)]
    assert (scans[0] > scans[1]) == (name != "tree")
    tiny.assert_close(final, expected)
    tiny.assert_close(grads, plain_grads, rtol=2e-4, atol=1e-5)
    assert grads[2] == 0
    assert largest(grads[1]) > 1e-3
    fresh = fn(weights, theta, jnp.float32(0), init(theta), True)[1]
    assert tiny.max_difference(final.params, fresh.params) > 1e-3


def test_blocked_replay_is_in_the_program_only_where_it_may_be():
    def primitives(**options):
        fn = outer_gradient("sgd", **options)
        args = (make_weights("sgd"), theta_0(), theta_0(), jnp.zeros(STEPS))
        return str(fn.trace(*args).jaxpr).count("scan[")

    assert primitives(**BLOCKED) > primitives(**FIRST)
    assert primitives(**SECOND, blocked=True) == primitives(**SECOND)


def test_second_order_changes_the_gradient_and_not_the_values():
    first_values, first = run(**FIRST)
    second_values, second = run(**SECOND)
    tiny.assert_close(first_values, second_values)
    assert tiny.max_difference(first[1], second[1]) > 1e-3
    assert tiny.max_difference(first[0], second[0]) > 1e-3


@pytest.mark.parametrize("mode", [FIRST, SECOND, BLOCKED], ids=["1", "2", "blocked"])
def test_truncation_cuts_exactly_the_gradient_across_segments(mode):
    cut = mode | {"truncate_every": 2}
    whole_values, _ = run(**mode)
    values, grads = run(**cut)
    tiny.assert_equal(values, whole_values)
    # theta_T lies behind the cut: theta_0 gets nothing, the rule what its last two
    # updates did
    assert largest(grads[1]) == 0
    assert tiny.max_difference(grads[0], run(**mode)[1][0]) > 1e-4
    assert largest(grads[0]) > 1e-3

    for t in range(STEPS):
        row = {"c": False, "d": np.eye(STEPS)[t]}
        whole, with_cut = run(**mode, **row)[1], run(**cut, **row)[1]
        if t < 2:  # before the cut nothing changes
            tiny.assert_close(with_cut, whole, rtol=1e-4, atol=1e-6)
        else:
            assert largest(with_cut[1]) == 0
    # the first loss behind the cut is not the rule's doing
    after = run(**cut, c=False, d=np.eye(STEPS)[2])[1]
    assert largest(after) == 0


@pytest.mark.parametrize(
    ("mode", "keep"),
    [(FIRST, "mixed"), (FIRST, "segments"), (BLOCKED, "segments")],
)
def test_what_is_kept_changes_no_first_order_gradient(mode, keep):
    weights = {"d": [1, 0, 2, 1]}
    expected = run("sgd", **mode, **weights)
    tiny.assert_close(run("sgd", **mode, **weights, keep=keep), expected)
    args = (make_weights("sgd"), theta_0(), theta_0(), jnp.zeros(STEPS))

    def checkpoints(**options):
        jaxpr = outer_gradient("sgd", **mode, **options).trace(*args).jaxpr
        return str(jaxpr).count("prevent_cse=False")

    assert checkpoints(keep=keep) > checkpoints()


def test_states_that_were_kept_are_not_computed_again(monkeypatch):
    """Of each block one loop; where they would take too much, two. One gradient."""
    found, loops = [], []
    for most in (coordinatewise._MOST_BYTES, 0):
        monkeypatch.setattr(coordinatewise, "_MOST_BYTES", most)
        outer_gradient.cache_clear()
        found.append(run(**BLOCKED, d=[1, 0, 2, 1]))
        args = (make_weights("gates"), theta_0(), theta_0(), jnp.zeros(STEPS))
        program = outer_gradient("gates", **BLOCKED).lower(*args).compile().as_text()
        loops.append(program.count(" while("))
    outer_gradient.cache_clear()
    assert loops == [3, 4]  # the inner loop, one over blocks, and in it theirs
    tiny.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Task(NamedTuple):
    """A learner's problem for the tests of what is kept, in float64."""

    learner: Learner
    batches: Batch  # x [T, N, ...]
    theta: LearnerState
    steps: int


def make_task(network: str) -> Task:
    """7 steps are two segments of 3 and one step; 4 are two of 2."""
    rng = np.random.default_rng(0)
    if network == "mlp":
        learner, steps, shape = tiny.norm_net(), 7, (tiny.FEATURES,)
    else:
        learner, steps, shape = nn.conv4(3, 2, num_blocks=1), 4, (4, 4, 1)
    x = rng.normal(size=(steps, 6, *shape))
    y = rng.integers(0, 3, (steps, 6))
    state = learner.init(jax.random.key(0), jnp.asarray(x[0], jnp.float32))
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), state)
    return Task(learner, Batch(jnp.asarray(x), jnp.asarray(y)), state, steps)


SLOW_RULES = {  # name: rule, and where its parameters are to be
    "rates": rules.learned_sgd((0.1, 0.5), per="parameter"),
    "gates": rules.lstm_gates(hidden_size=2, input_bias=(-1.0, 0.0)),
    "l2l": rules.l2l(hidden_size=2, num_layers=1, features="raw"),
}


def gradient_of_everything(task: Task, rule: UpdateRule, **options):
    """Values, and gradients by rule, theta_0, images and what the loss closes over.

    The objective has all there is in it: theta_T, the losses, the statistics. Noise
    comes from the key, labels are integers, and closed-over arrays are of both kinds.
    """
    shift = jnp.arange(6) % 2

    def objective(weights, theta, x, closed_over):
        def loss_fn(params, stats, batch, key):
            state = LearnerState(params, stats, task.theta.other)
            noise = jax.random.normal(key, batch.x.shape, jnp.float64)
            inputs = batch.x * closed_over["scale"] + 0.1 * noise
            outputs, new = task.learner.apply(state, inputs, norm="batch")
            labels = (batch.y + shift) % 3
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
            return losses.mean() + closed_over["decay"] * squares, new.stats

        final, trace = unroll(
            loss_fn,
            rule,
            weights,
            theta,
            Batch(x, task.batches.y),
            num_steps=task.steps,
            differentiation=second_order(**options),
            stats=task.theta.stats,
            key=jax.random.key(5),
        )
        wave = lambda leaf: jnp.sin(1 + jnp.arange(leaf.size)).reshape(leaf.shape)  # noqa: E731
        ends = jax.tree.leaves((final.params, final.stats))
        value = sum(jnp.vdot(wave(leaf), leaf**2) for leaf in ends)
        return value + jnp.vdot(wave(trace.losses), trace.losses), final.params

    closed_over = {"scale": jnp.float64(1.1), "decay": jnp.float64(0.05)}
    params = task.theta.params
    weights = rule.init(jax.random.key(1), params)
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), weights)
    args = (weights, params, task.batches.x, closed_over)
    fn = tiny.quick_jit(jax.grad(objective, (0, 1, 2, 3), has_aux=True))
    return fn, args


@pytest.mark.parametrize(
    ("network", "name", "choices", "options"),
    [
        ("mlp", "rates", ["remat", "segments"], {}),
        ("mlp", "gates", ["segments"], {"truncate_every": 3}),
        ("mlp", "l2l", ["mixed"], {}),
        ("conv", "rates", ["segments"], {}),
    ],
)
def test_what_is_kept_changes_no_second_order_gradient(network, name, choices, options):
    """Batch norm, noise, learned rates, LSTMs: to 1e-6 in float64, and much better."""
    with jax.enable_x64(True):
        task, rule = make_task(network), SLOW_RULES[name]
        fn, args = gradient_of_everything(task, rule, keep="all", **options)
        expected, final = fn(*args)
        for part in expected:
            assert largest(part) > 1e-3
        for keep in choices:
            fn, args = gradient_of_everything(task, rule, keep=keep, **options)
            grads, end = fn(*args)
            tiny.assert_close(end, final, rtol=1e-12)
            tiny.assert_close(grads, expected, rtol=1e-9, atol=1e-11)


def test_stored_memory_shrinks_from_choice_to_choice():
    """Bytes of the compiled gradient: a wide layer, and a rule with a large state."""
    rule = rules.l2l(hidden_size=4, num_layers=1, features="raw")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 30)), jnp.float32)

    def loss_fn(params, stats, batch, key):
        hidden = jnp.tanh(jnp.sin(x @ params["w"]) ** 2)
        return jnp.mean(jnp.tanh(hidden @ params["v"]) ** 2), stats

    def objective(weights, theta, keep):
        options = {"num_steps": 36, "differentiation": second_order(keep)}
        return unroll(loss_fn, rule, weights, theta, **options)[1].losses.sum()

    theta = {"w": jnp.full((30, 20), 0.1), "v": jnp.full(20, 0.1)}
    args = (rule.init(jax.random.key(0), theta), theta)

    def stored(keep):
        fn = tiny.quick_jit(jax.grad(functools.partial(objective, keep=keep)))
        return fn.lower(*args).compile().memory_analysis().temp_size_in_bytes

    everything, remat, mixed, segments = map(stored, KEEPS)
    assert remat < 0.5 * everything
    assert remat < mixed < 0.5 * everything  # the gradients are kept
    assert segments < 0.5 * remat


def test_mixed_derivatives_map_over_tasks_and_can_be_differentiated_again():
    """vmap = loop; forward over reverse = reverse over reverse = the plain path's."""
    rule = rules.learned_sgd((0.1, 0.2), per="parameter")
    thetas = jnp.linspace(-1, 1, 6).reshape(2, 3)
    weights = rule.init(jax.random.key(0), thetas[0])

    def gradient(weights, theta, keep):
        def objective(weights):
            final, trace = unroll(
                loss_fn,
                rule,
                weights,
                theta,
                num_steps=3,
                differentiation=second_order(keep),
                stats=jnp.float32(0),
            )
            return jnp.sum(jnp.sin(final.params)) + trace.losses[1]

        return jax.grad(objective)(weights)

    def both(theta, keep):
        fn = functools.partial(gradient, theta=theta, keep=keep)
        again = jax.grad(lambda w: _dot(fn(w), weights))(weights)
        return *jax.jvp(fn, (weights,), (weights,)), again

    @tiny.quick_jit
    def everything(thetas):
        return (
            jax.vmap(functools.partial(both, keep="mixed"))(thetas),
            jax.lax.map(functools.partial(both, keep="all"), thetas),
            both(thetas[1], "segments"),
        )

    mixed, expected, segments = everything(thetas)
    tiny.assert_close(mixed, expected, rtol=1e-4)
    tiny.assert_close(mixed[1], mixed[2], rtol=1e-4)
    second_task = jax.tree.map(lambda leaf: leaf[1], expected)
    tiny.assert_close(segments, second_task, rtol=1e-4)
    assert largest(mixed[1]) > 1e-3


def test_mixed_derivatives_of_stacked_problems_are_those_of_each():
    """A loss for each problem; one counts for more than the other."""
    thetas = jnp.array([[0.3, -1.0], [0.8, 0.1]])

    def losses_fn(params, stats, batch, key):
        return jnp.cosh(params * jnp.array([1.0, 2.0])).sum(-1), stats

    def objective(rate, thetas, keep):
        options = {"num_steps": 3, "differentiation": second_order(keep)}
        final, trace = unroll(losses_fn, rules.learned_sgd(), rate, thetas, **options)
        return _dot(trace.losses, jnp.arange(6.0).reshape(3, 2)) + final.params[0, 1]

    everything, mixed = (
        jax.grad(objective, (0, 1))(jnp.float32(0.1), thetas, keep)
        for keep in ("all", "mixed")
    )
    tiny.assert_close(mixed, everything)


def test_mixed_has_no_forward_derivative_and_says_so():
    def losses(rate, keep):
        options = {"num_steps": 2, "differentiation": second_order(keep), "stats": 0}
        return unroll(loss_fn, rules.learned_sgd(), rate, jnp.ones(2), **options)[
            1
        ].losses

    for keep in ("all", "remat"):
        assert largest(jax.jacfwd(losses)(0.1, keep)) > 1e-3
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(losses)(0.1, "mixed")


def test_segments_are_about_as_long_as_there_are_many():
    for steps in range(1, 400):
        length = scanning.segment_length(steps)
        assert math.sqrt(steps) <= length < 2 * math.sqrt(steps) + 2
    lengths = [scanning.segment_length(steps) for steps in (1, 7, 10, 30, 100, 300)]
    assert lengths == [1, 3, 5, 6, 10, 20]


def sgd_losses(rate, theta, differentiation, rule=None):
    """Losses of SGD on a quadratic of curvature 3 in x and 1 in y."""

    def quadratic(params, stats, batch, key):
        return 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * params**2), stats

    rule = rules.learned_sgd() if rule is None else rule
    final, trace = unroll(
        quadratic, rule, rate, theta, num_steps=3, differentiation=differentiation
    )
    return trace.losses, final.params


def test_derivatives_of_the_losses_in_closed_form():
    """First order: dL_t is g_t by theta_0, and -g_t . sum of g_s by the rate."""
    rate, theta = 0.1, jnp.array([1.0, -2.0])
    curvature = np.array([3.0, 1.0])
    thetas = [theta * (1 - rate * curvature) ** t for t in range(4)]
    gradients = [curvature * thetas[t] for t in range(3)]

    jacobian = jax.jacrev(
        functools.partial(sgd_losses, differentiation=first_order()), (0, 1)
    )
    (by_rate, by_theta), final_by = tiny.quick_jit(jacobian)(rate, theta)
    np.testing.assert_allclose(by_theta, gradients, rtol=1e-6)
    expected = [-gradients[t] @ sum(gradients[:t], 0 * theta) for t in range(3)]
    np.testing.assert_allclose(by_rate, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final_by[1], np.eye(2), atol=1e-7)

    jacobian = jax.jacrev(
        functools.partial(sgd_losses, differentiation=second_order("all")), (0, 1)
    )
    (_, by_theta), final_by = tiny.quick_jit(jacobian)(rate, theta)
    shrink = [(1 - rate * curvature) ** t for t in range(4)]
    expected = [gradients[t] * shrink[t] for t in range(3)]
    np.testing.assert_allclose(by_theta, expected, rtol=1e-5)
    np.testing.assert_allclose(final_by[1], np.diag(shrink[3]), atol=1e-6)


@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "blocked"])
def test_the_second_derivative_of_what_theta_becomes_in_closed_form(blocked):
    """theta_T = theta_0 + constant, so that of |theta_T|^2 is 2."""
    rule = rules.learned_sgd() if blocked else plain(rules.learned_sgd())

    def objective(theta):
        return jnp.sum(sgd_losses(0.1, theta, first_order(), rule)[1] ** 2)

    hessian = jax.jacfwd(jax.grad(objective))
    by_theta = tiny.quick_jit(hessian)(jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(by_theta, 2 * np.eye(2), rtol=1e-6)


def test_statistics_minibatches_keys_and_what_is_observed():
    key = jax.random.key(3)
    batches = jnp.arange(3.0)

    def noisy(params, stats, batch, key):
        return params * batch + jax.random.uniform(key), stats + batch

    final, trace = unroll(
        noisy,
        optax.sgd(0.5),
        (),
        jnp.float32(1),
        batches,
        num_steps=3,
        differentiation=first_order(),
        stats=jnp.float32(0),
        key=key,
        observe=lambda state: (state.params, state.stats),
    )
    # the gradient is the batch, so theta goes 1, 1, 0.5, -0.5
    noise = [float(jax.random.uniform(jax.random.fold_in(key, t))) for t in range(3)]
    np.testing.assert_allclose(trace.losses, np.add([0, 1, 1], noise), rtol=1e-6)
    np.testing.assert_allclose(trace.observed[0], [1, 0.5, -0.5])
    np.testing.assert_allclose(trace.observed[1], [0, 1, 3])
    assert final.params == -0.5
    assert final.stats == 3


def test_without_key_and_batches_the_loss_gets_none():
    seen = []

    def watching(params, stats, batch, key):
        seen.append((batch, key))
        return params**2, stats

    options = {"num_steps": 1, "differentiation": first_order()}
    unroll(watching, optax.sgd(0.5), (), 1.0, **options)
    assert seen == [(None, None)]


@pytest.mark.parametrize("mode", [FIRST, SECOND, BLOCKED], ids=["1", "2", "blocked"])
def test_a_given_rule_state_is_continued(mode):
    """Two windows are one unroll, for a rule that remembers."""
    rule, weights = RULES["gates"], make_weights("gates")
    rule = rule if "blocked" in mode else plain(rule)

    def window(state, num_steps):
        params, stats, rule_state = state
        return unroll(
            loss_fn,
            rule,
            weights,
            params,
            num_steps=num_steps,
            differentiation=Differentiation(mode["order"], "all"),
            stats=stats,
            rule_state=rule_state,
        )[0]

    window = tiny.quick_jit(window, static_argnums=1)
    start = (theta_0(), jnp.float32(0), rule.bind(weights).init(theta_0()))
    halfway = window(start, 2)
    tiny.assert_close(window(halfway, 2), window(start, 4))
    fresh = window(halfway._replace(rule_state=None), 2)
    assert tiny.max_difference(fresh.params, window(start, 4).params) > 1e-4


def test_mixed_precision_leaves_round_alike_in_blocks():
    theta = {"half": jnp.ones(5, jnp.bfloat16), "single": jnp.ones(3)}
    weights = make_weights("gates")

    def final_params(rule):
        return unroll(
            loss_fn,
            rule,
            weights,
            theta,
            num_steps=3,
            differentiation=first_order(),
            stats=jnp.float32(0),
        )[0].params

    blocked = final_params(RULES["gates"])
    assert blocked["half"].dtype == jnp.bfloat16
    tiny.assert_equal(blocked, final_params(plain(RULES["gates"])))


def test_the_blocked_gradient_maps_over_tasks_and_can_be_differentiated_again():
    """Under vmap: forward over reverse = reverse over reverse = the plain path's."""
    rule = rules.lstm_gates(hidden_size=1)
    thetas = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3)}
    weights = jax.tree.map(
        lambda leaf: 20 * leaf, rule.init(jax.random.key(0), {"w": thetas["w"][0]})
    )

    def gradient(weights, theta, rule):
        def objective(weights):
            options = {"num_steps": 2, "differentiation": first_order()}
            options["stats"] = jnp.float32(0)
            final, _ = unroll(loss_fn, rule, weights, theta, **options)
            return jnp.sum(jnp.sin(final.params["w"]))

        return jax.grad(objective)(weights)

    def forward(theta, rule):
        fn = functools.partial(gradient, theta=theta, rule=rule)
        return jax.jvp(fn, (weights,), (weights,))

    def reverse(theta, rule):
        return jax.grad(lambda w: _dot(gradient(w, theta, rule), weights))(weights)

    @tiny.quick_jit
    def everything(thetas):
        return (
            jax.vmap(lambda theta: forward(theta, rule))(thetas),
            jax.vmap(lambda theta: reverse(theta, rule))(thetas),
            forward({"w": thetas["w"][1]}, plain(rule)),
        )

    blocked, blocked_reverse, expected = everything(thetas)
    second_task = jax.tree.map(lambda leaf: leaf[1], blocked)
    tiny.assert_close(blocked[1], blocked_reverse, rtol=1e-3, atol=1e-6)
    tiny.assert_close(second_task, expected, rtol=1e-3, atol=1e-6)


def _dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: first_order("sqrt"), r"keep='sqrt': choose one of all, remat, mixed,"),
        (lambda: first_order(truncate_every=0), r"truncate_every=0: choose 1 or more"),
        (lambda: second_order(last=0), r"last=0: choose 1 or more or None"),
        (
            lambda: Differentiation("third", "all"),
            r"order='third': choose one of first",
        ),
        (lambda: Differentiation("first", "all", 2), r"last=2 needs second order"),
    ],
)
def test_wrong_ways_to_differentiate_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, r"num_steps=0: choose 1 or more"),
        (
            {"num_steps": 2, "batches": jnp.zeros((3, 1))},
            r"shape \(3, 1\) but num_steps=2: stack one batch for each step",
        ),
        ({"num_steps": 1, "axis_name": "rows"}, r"axis_name='rows' is no axis of the"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    options["differentiation"] = first_order()
    with pytest.raises(ValueError, match=message):
        unroll(loss_fn, rules.learned_sgd(), 0.1, jnp.ones(1), stats=0, **options)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"neither an UpdateRule nor an optax transfor"):
        rules.as_rule(0.1)


def test_how_to_differentiate_has_no_default():
    with pytest.raises(TypeError, match="differentiation"):
        unroll(loss_fn, optax.sgd(0.1), (), 1.0, num_steps=1)


def test_second_order_in_the_last_steps_is_that_of_one_unroll_after_another():
    """The first steps in first order, then the last in second; all of them is all."""
    values, grads = run(**SECOND, last=2)
    first_values, first = run(**FIRST)
    _, second = run(**SECOND)
    tiny.assert_close(values, first_values)
    for other in (first, second):
        assert tiny.max_difference(grads[1], other[1]) > 1e-4
        assert tiny.max_difference(grads[0], other[0]) > 1e-4
    tiny.assert_equal(run(**SECOND, last=STEPS)[1], second)
    tiny.assert_equal(run(**SECOND, last=STEPS + 1)[1], second)

    rule, weights = plain(RULES["gates"]), make_weights("gates")

    def in_two(weights, theta, c):
        options = {"num_steps": 2, "stats": jnp.float32(0)}
        state = rule.bind(weights).init(theta)
        for differentiation in (first_order(), second_order("all")):
            end, _ = unroll(
                loss_fn,
                rule,
                weights,
                theta,
                rule_state=state,
                differentiation=differentiation,
                **options,
            )
            theta, state = end.params, end.rule_state
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, c, theta)))

    draw = lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape) / 50  # noqa: E731
    c = jax.tree.map(draw, theta_0())
    expected = tiny.quick_jit(jax.grad(in_two, (0, 1)))(weights, theta_0(), c)
    tiny.assert_close(grads, expected, rtol=1e-4)


def test_second_order_in_the_last_step_in_closed_form():
    """Of theta_T by theta_0: earlier steps have the slope 1, the last 1 - rate c."""
    rate, theta = 0.1, jnp.array([1.0, -2.0])
    curvature = np.array([3.0, 1.0])
    for keep in KEEPS:
        how = second_order(keep, last=1)
        fn = lambda theta: sgd_losses(rate, theta, how)  # noqa: B023, E731
        by_losses, by_end = tiny.quick_jit(jax.jacrev(fn))(theta)
        np.testing.assert_allclose(by_end, np.diag(1 - rate * curvature), atol=1e-6)
        thetas = [theta * (1 - rate * curvature) ** t for t in range(3)]
        np.testing.assert_allclose(
            by_losses, [curvature * theta for theta in thetas], rtol=1e-5
        )


@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "blocked"])
def test_a_scaled_gradient_is_scaled_for_the_rule_alone(blocked):
    """The losses keep their own derivative, and the rule its state and parameters."""
    rule = rules.learned_sgd() if blocked else plain(rules.learned_sgd())
    theta = jnp.array([1.0, -2.0])

    def losses(theta, rate, scale):
        final, trace = unroll(
            lambda params, stats, batch, key: (jnp.sum(jnp.cosh(params)), stats),
            rule,
            rate,
            theta,
            num_steps=3,
            differentiation=first_order(),
            gradient_scale=scale,
        )
        return trace.losses, final

    (by_scale, scaled), (by_rate, expected) = (
        tiny.quick_jit(jax.jacrev(losses, has_aux=True))(theta, *pair)
        for pair in ((0.1, 0.5), (0.05, 1.0))
    )
    tiny.assert_close((by_scale, scaled), (by_rate, expected))
    assert scaled.rule_state == 3
