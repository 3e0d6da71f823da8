"""The Meta-LSTM against a numpy transcription of the paper, float64, to 1e-6.

Meta-gradients are compared with finite differences of the transcription: first order
with the recorded losses and gradients held fixed, second order with nothing held fixed
(or, where the features are stopped, with what the gates read held fixed).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny

from metalstm import algorithms, rules
from metalstm.base import Batch, Episode, LearnerState, MetaParams
from metalstm.inner import first_order, second_order, unroll

NET = reference.TanhNet()
STEPS, HIDDEN, SUPPORT = 4, 3, 6
CASES = [(v, h) for v in ("code", "paper") for h in (HIDDEN, 0)]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Task(NamedTuple):
    theta: np.ndarray
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]


def make_task() -> Task:
    """A faint first input, so that its gradients fall below e^-p and no other's do."""
    rng = np.random.default_rng(241)

    def draw(num):
        x = rng.normal(size=(num, NET.inputs)) * [1e-4, 1, 1]
        return x, rng.integers(0, NET.classes, num)

    return Task(rng.normal(size=NET.size), draw(SUPPORT), draw(9))


@functools.cache
def make_rule(variant: str, hidden: int, **options):
    """A rule, weights large enough that everything matters, and the paper's view."""
    rule = rules.lstm_gates(variant=variant, hidden_size=hidden, **options)
    params = rule.init(jax.random.key(0), NET.unpack(np.zeros(NET.size)))
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape), params)
    weights["forget"]["bias"] += 2.0  # f about 0.9, i about 0.3
    weights["input"]["bias"] -= 1.0
    return rule, weights


def published(weights) -> reference.MetaLstm:
    """The library's arrays in the layout of the transcription."""
    lstm = None
    if "lstm" in weights:
        kernel = weights["lstm"]["kernel"]  # reads [gradient 2, hidden]
        inputs = np.concatenate([weights["lstm"]["loss_kernel"], kernel[:, :2]], axis=1)
        lstm = reference.Lstm(inputs, kernel[:, 2:], weights["lstm"]["bias"])
    gates = [
        reference.Gate(w["features"], w["theta"], w["carry"], w["bias"])
        for w in (weights["forget"], weights["input"])
    ]
    return reference.MetaLstm(lstm, *gates)


def cross_entropy(params, x, y):
    outputs = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def library(rule, weights, task: Task, differentiation, blocked: bool = False):
    """Query loss at theta_T, its gradient by (rule, theta_0), and the trajectory."""

    traits = rule.traits._replace(coordinatewise=blocked)

    def objective(weights, theta):
        final, trace = unroll(
            lambda params, stats, batch, key: (
                cross_entropy(params, *task.support),
                stats,
            ),
            rule._replace(traits=traits),
            weights,
            theta,
            num_steps=STEPS,
            differentiation=differentiation,
            gradient_scale=1 / SUPPORT,
            observe=lambda s: (s.params, rules.find_gates(s.rule_state)),
        )
        return cross_entropy(final.params, *task.query), (final.params, trace)

    fn = tiny.quick_jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    return fn(weights, NET.unpack(task.theta))


def numpy_unroll(weights, theta, task: Task, variant: str, **held):
    carried = {"code": "logit", "paper": "value"}[variant]
    support = NET.objective(*task.support)
    run = reference.unroll_meta_lstm(
        published(weights),
        theta,
        support,
        STEPS,
        carried=carried,
        gradient_scale=1 / SUPPORT,
        **held,
    )
    return run, NET.objective(*task.query)(run.thetas[-1])[0]


@functools.cache
def numpy_gradient(variant: str, hidden: int, held: str | None = None):
    """Finite differences by every rule parameter and by theta_0.

    ``held`` names what of the undisturbed run is held fixed: see `reference`.
    """
    task, (_, weights) = make_task(), make_rule(variant, hidden)
    run, _ = numpy_unroll(weights, task.theta, task, variant)
    fixed = {held: run.records} if held else {}
    leaves, treedef = jax.tree.flatten(weights)
    sizes = [leaf.size for leaf in leaves]
    start = np.concatenate([*(leaf.ravel() for leaf in leaves), task.theta])

    def loss(flat):
        *parts, theta = np.split(flat, np.cumsum(sizes))
        parts = [
            part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
        ]
        unflat = jax.tree.unflatten(treedef, parts)
        return numpy_unroll(unflat, theta, task, variant, **fixed)[1]

    return reference.central_difference(loss, start, 1e-4)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


def test_the_transcriptions_gradient_is_the_derivative_of_its_loss(task):
    objective = NET.objective(*task.support)
    numeric = reference.central_difference(
        lambda theta: objective(theta)[0], task.theta, 1e-4
    )
    np.testing.assert_allclose(objective(task.theta)[1], numeric, **TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "hidden", "blocked"),
    [(*case, False) for case in CASES] + [(*CASES[0], True), (*CASES[-1], True)],
)
def test_first_order(task, variant, hidden, blocked):
    rule, weights = make_rule(variant, hidden)
    (loss, (final, trace)), grads = library(rule, weights, task, first_order(), blocked)
    run, numpy_loss = numpy_unroll(weights, task.theta, task, variant)
    thetas, gates = trace.observed

    np.testing.assert_allclose(loss, numpy_loss, **TOLERANCE)
    for t in range(STEPS):
        step = jax.tree.map(lambda leaf: leaf[t], thetas)  # noqa: B023
        np.testing.assert_allclose(flat(step), run.thetas[t], **TOLERANCE)
    np.testing.assert_allclose(flat(final), run.thetas[-1], **TOLERANCE)
    np.testing.assert_allclose(gates["forget"], run.forget, **TOLERANCE)
    np.testing.assert_allclose(gates["input"], run.input, **TOLERANCE)
    losses = [record.loss for record in run.records]
    np.testing.assert_allclose(trace.losses, losses, **TOLERANCE)

    numeric = numpy_gradient(variant, hidden, "held")
    np.testing.assert_allclose(flat(grads), numeric, **TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "hidden", "features"),
    [(*c, "full") for c in CASES] + [(*c, "stopped") for c in (CASES[0], CASES[-1])],
)
def test_second_order(task, variant, hidden, features):
    rule, weights = make_rule(variant, hidden, feature_gradient=features)
    (loss, _), grads = library(rule, weights, task, second_order("all"))
    run, numpy_loss = numpy_unroll(weights, task.theta, task, variant)
    np.testing.assert_allclose(loss, numpy_loss, **TOLERANCE)
    # the features have a corner at |g| = e^-10: differences must stay on one side
    magnitudes = np.abs([record.gradient for record in run.records]) / SUPPORT
    faint = magnitudes < np.exp(-10)
    assert magnitudes[faint].max() < 0.5 * np.exp(-10)
    assert magnitudes[~faint].min() > 10 * np.exp(-10)
    held = None if features == "full" else "held_features"
    numeric = numpy_gradient(variant, hidden, held)
    np.testing.assert_allclose(flat(grads), numeric, **TOLERANCE)


@pytest.mark.parametrize("how", [first_order(), second_order()])
def test_meta_lstm_is_the_published_algorithm(task, how):
    """The algorithm itself: gradient / batch size, then query loss at theta_T."""
    rule, weights = make_rule("code", HIDDEN)
    algorithm = algorithms.published_meta_lstm(
        tiny.tanh_net(NET.hidden, NET.classes, NET.inputs),
        rule,
        num_steps=STEPS,
        differentiation=how,
    )
    params = MetaParams(LearnerState(NET.unpack(task.theta), {}, {}), weights)
    episode = Episode(Batch(*task.support), Batch(*task.query))
    (loss, _), grads = tiny.quick_jit(jax.value_and_grad(algorithm.loss, has_aux=True))(
        params, jax.random.key(0), episode
    )
    _, numpy_loss = numpy_unroll(weights, task.theta, task, "code")
    np.testing.assert_allclose(loss, numpy_loss, **TOLERANCE)
    held = "held_features" if how.order == "second" else "held"
    numeric = numpy_gradient("code", HIDDEN, held)
    np.testing.assert_allclose(
        np.concatenate([flat(grads.rule), flat(grads.learner)]), numeric, **TOLERANCE
    )


def test_the_code_variant_is_published_with_20_hidden_units():
    theta = {"w": jnp.zeros(2)}
    params = rules.lstm_gates().init(jax.random.key(0), theta)
    assert params["lstm"]["kernel"].shape == (80, 22)
    assert 4 < params["forget"]["bias"] < 5
    assert -5 < params["input"]["bias"] < -4
    weights = flat(params["lstm"])
    assert 0.009 < np.abs(weights).max() <= 0.01
    paper = rules.lstm_gates(variant="paper").init(jax.random.key(0), theta)
    assert "lstm" not in paper
    assert paper["forget"]["features"].shape == (4,)
