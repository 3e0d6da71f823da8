"""Closed forms of ANIL, Reptile and gradient agreement."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_algorithms import (
    EPISODE,
    KEY,
    NET,
    TASK,
    W,
    slope_learner,
)

from metalstm import algorithms, rules
from metalstm.algorithms.gradient.agreement import agreement_weights
from metalstm.base import Episode, LearnerState, MetaParams
from metalstm.inner import first_order
from metalstm.nn import tied_head

RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Spec:
    way: int = 5
    shot: int = 1
    queries: int = 15


def slope_params() -> MetaParams:
    return MetaParams(LearnerState(jnp.float32(W), {}, {}), ())


def meta_gradient(algorithm, params, episodes):
    """[T] episodes -> gradient and metrics, by the algorithm's own rule."""
    keys = jax.random.split(KEY, jax.tree.leaves(episodes)[0].shape[0])
    fn = tiny.quick_jit(lambda p, e: algorithm.meta_gradient(p, (), keys, e))
    grads, _, metrics = fn(params, episodes)
    return grads, metrics


def batch_of(*episodes: Episode) -> Episode:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)


# -- Reptile ---------------------------------------------------------------------------


def test_reptile_on_parabolas_in_closed_form():
    """SGD contracts w - y/x by 1 - 2 a x^2 a step; the batch is the mean over tasks."""
    tasks = (TASK, TASK._replace(support=(1.0, -2.0)))
    ends = []
    for x, y in (task.support for task in tasks):
        ends.append(y / x + (1 - 2 * RATE * x**2) ** 4 * (W - y / x))
    sgd = rules.as_rule(optax.sgd(RATE))
    reptile = algorithms.reptile(slope_learner(), sgd, num_steps=4)
    both = batch_of(*(task.episode() for task in tasks))
    grads, _ = meta_gradient(reptile, slope_params(), both)
    np.testing.assert_allclose(grads.learner.params, W - np.mean(ends), rtol=1e-5)
    alone, _ = meta_gradient(reptile, slope_params(), batch_of(TASK.episode()))
    np.testing.assert_allclose(alone.learner.params, W - ends[0], rtol=1e-5)


def test_reptiles_own_rule_is_adam_without_momentum():
    """Equations of Kingma & Ba (2015) with beta1 = 0, beta2 = 0.999."""
    x, y = TASK.support
    w, second = W, 0.0
    for t in (1, 2, 3):
        gradient = 2 * x * (x * w - y)
        second = 0.999 * second + 0.001 * gradient**2
        w -= 0.2 * gradient / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    reptile = algorithms.reptile(slope_learner(), 0.2, num_steps=3)
    grads, _ = meta_gradient(reptile, slope_params(), batch_of(TASK.episode()))
    np.testing.assert_allclose(grads.learner.params, W - w, rtol=1e-4)


def test_adams_averages_continue_from_task_to_task_and_at_the_test():
    """One Adam in float64 that never restarts, while w returns to theta_0."""
    w, second, count = W, 0.0, 0
    reptile = algorithms.reptile(
        slope_learner(), 0.2, num_steps=3, num_test_steps=2, rule_state="continued"
    )
    params = reptile.init(KEY, TASK.episode())
    params = params._replace(learner=slope_params().learner)
    carry = reptile.init_carry(KEY, params, TASK.episode())

    def adam(w, second, count, task, steps):
        x, y = task.support
        for _ in range(steps):
            count += 1
            gradient = 2 * x * (x * w - y)
            second = 0.999 * second + 0.001 * gradient**2
            w -= 0.2 * gradient / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        return w, second, count

    for task in PARABOLAS:
        end, second, count = adam(w, second, count, task, 3)
        grads, carry, _ = reptile.meta_gradient(
            params, carry, KEY[None], batch_of(task.episode())
        )
        np.testing.assert_allclose(grads.learner.params, W - end, rtol=1e-4)
        params = reptile.absorb(params, carry)
    tested, _ = reptile.adapt(params, KEY, TASK.episode().support, num_classes=None)
    expected, _, _ = adam(w, second, count, TASK, 2)
    np.testing.assert_allclose(tested.params, expected, rtol=1e-4)


def test_adams_averages_of_a_tied_head_are_the_mean_of_its_classes():
    learner = tied_head(tiny.tanh_net(num_classes=4))
    reptile = algorithms.reptile(
        learner, 0.1, num_steps=2, train_way=tiny.WAY, rule_state="continued"
    )
    params = reptile.init(jax.random.key(0), EPISODE)
    _, carry, _ = tiny.quick_jit(
        lambda p: reptile.meta_gradient(p, p.rule, KEY[None], batch_of(EPISODE))
    )(params)
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, params.rule)
    plain = algorithms.learned_init(
        learner,
        optax.adam(0.1, b1=0.0),
        num_steps=2,
        train_way=tiny.WAY,
        differentiation=first_order(),
    )
    adapt = functools.partial(plain.adapt, num_classes=tiny.WAY)
    end, _ = tiny.quick_jit(adapt)(params._replace(rule=()), KEY, EPISODE.support)
    squares = end.rule_state[0].nu["head"]["kernel"]
    found = carry.state[0].nu["head"]["kernel"]
    np.testing.assert_allclose(found, squares.mean(1, keepdims=True), rtol=1e-5)


def test_reptile_moves_a_tied_head_by_the_mean_of_its_classes():
    learner = tied_head(tiny.tanh_net(num_classes=4))
    # Adam, since the classes' steps of SGD add up to nothing
    adam = rules.as_rule(optax.adam(0.3, b1=0.0))
    options = {"num_steps": 2, "train_way": tiny.WAY}
    reptile = algorithms.reptile(learner, adam, **options)
    plain = algorithms.learned_init(
        learner, adam, differentiation=first_order(), **options
    )
    params = plain.init(jax.random.key(0), EPISODE)
    adapt = functools.partial(plain.adapt, num_classes=tiny.WAY)
    end, _ = tiny.quick_jit(adapt)(params, KEY, EPISODE.support)
    grads, _ = meta_gradient(reptile, params, batch_of(EPISODE))
    start = params.learner.params["head"]["kernel"]
    expected = start - end.params["head"]["kernel"].mean(1, keepdims=True)
    found = grads.learner.params["head"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def combined():
    """The meta-gradient on two parabolas, of any weights; compiled once."""
    sgd = rules.as_rule(optax.sgd(RATE))
    both = batch_of(*(task.episode() for task in PARABOLAS))
    keys = jax.random.split(KEY, 2)

    def run(weights):
        reptile = algorithms.reptile(
            slope_learner(), sgd, num_steps=4, gradient_weights=weights
        )
        return reptile.meta_gradient(slope_params(), (), keys, both)[0].learner.params

    return tiny.quick_jit(run)


PARABOLAS = (TASK, TASK._replace(support=(1.0, -2.0)))


def inner_gradients() -> np.ndarray:
    """g_1 .. g_4 of SGD on each parabola (w x - y)^2, in float64: [tasks, 4]."""
    found = []
    for x, y in (task.support for task in PARABOLAS):
        w, gradients = W, []
        for _ in range(4):
            gradients.append(2 * x * (x * w - y))
            w -= RATE * gradients[-1]
        found.append(gradients)
    return np.array(found)


@pytest.mark.parametrize(
    "weights",
    [(1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (0.5, 0.5, 0, 0), (0, 0, 0, 1)],
)
def test_reptile_combines_inner_gradients_in_closed_form(combined, weights):
    expected = (inner_gradients() @ np.array(weights)).mean()
    found = combined(jnp.array(weights, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_first_gradient_alone_is_joint_training(combined):
    """The gradient of the mean loss over tasks at theta_0, without any adaptation."""
    joint = lambda w: sum((x * w - y) ** 2 for x, y in supports) / 2  # noqa: E731
    supports = [task.support for task in PARABOLAS]
    expected = (joint(W + 1e-5) - joint(W - 1e-5)) / 2e-5
    found = combined(jnp.array([1.0, 0, 0, 0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_all_gradients_are_reptiles_displacement_over_the_rate(combined):
    ends = [W - RATE * gradients.sum() for gradients in inner_gradients()]
    found = combined(jnp.ones(4))
    np.testing.assert_allclose(found, (W - np.mean(ends)) / RATE, rtol=1e-5)
    two = combined(jnp.array([1.0, 1, 0, 0]))
    half = combined(jnp.array([0.5, 0.5, 0, 0]))
    np.testing.assert_allclose(half, two / 2, rtol=1e-6)


def test_combined_gradients_of_minibatches_and_of_a_scaled_tied_head():
    """The same minibatches as Reptile's own inner loop, behind a chain, pulled back."""
    learner = tied_head(tiny.tanh_net(num_classes=4))
    sgd = rules.as_rule(optax.chain(optax.scale(1.0), optax.sgd(RATE)))
    options = {
        "num_steps": 3, "batch_size": 2, "train_way": tiny.WAY, "gradient_scale": "way",
    }  # fmt: skip
    plain = algorithms.reptile(learner, sgd, **options)
    summed = algorithms.reptile(learner, sgd, gradient_weights=(1, 1, 1), **options)
    params = plain.init(jax.random.key(0), EPISODE)
    moved, _ = meta_gradient(plain, params, batch_of(EPISODE))
    found, _ = meta_gradient(summed, params, batch_of(EPISODE))
    # the head's copies move against each other, so that only the body moves
    tiny.assert_close(
        jax.tree.map(lambda g: RATE * g, found.learner.params),
        moved.learner.params,
        atol=1e-6,
    )
    body = moved.learner.params["body"]
    assert tiny.max_difference(body, jax.tree.map(jnp.zeros_like, body)) > 1e-3


def test_there_is_one_weight_for_each_update():
    with pytest.raises(ValueError, match=r"shape \(2,\) but num_steps=3: give one"):
        algorithms.reptile(NET, num_steps=3, gradient_weights=(1.0, 1.0))


def test_reptile_trains_on_more_shots_and_tests_on_more_steps():
    reptile = algorithms.reptile(NET, train_shots=10, num_steps=2)
    assert reptile.train_sampler(Spec()) == Spec(5, 10, 1)
    assert algorithms.reptile(NET).train_sampler(Spec()) == Spec(5, 1, 1)
    params = reptile.init(KEY, EPISODE)
    _, trace = jax.eval_shape(reptile.adapt, params, KEY, EPISODE.support)
    assert trace.losses.shape == (50,)


def test_reptile_and_implicit_maml_gather_no_averages():
    for factory in (algorithms.reptile, algorithms.implicit_maml):
        with pytest.raises(ValueError, match=r"gathers no averages .* choose support"):
            factory(NET, query_norm="frozen")


def test_reptile_keeps_the_averages_of_a_trained_start():
    """Every update, and the queries, are normalised by them; they stay as they are."""
    reptile = algorithms.reptile(
        NET, optax.sgd(0.1), num_steps=3, query_norm="frozen", frozen_stats="kept"
    )
    params = reptile.init(KEY, EPISODE)
    kept = jax.tree.map(lambda leaf: leaf + 0.5, params.learner.stats)
    params = params._replace(learner=params.learner._replace(stats=kept))
    state, theta = params.learner, params.learner.params

    def loss(theta, batch):
        outputs, _ = NET.apply(state._replace(params=theta), batch.x, norm="stored")
        logs = jax.nn.log_softmax(outputs)
        return -logs[jnp.arange(len(batch.y)), batch.y].mean(), outputs

    for _ in range(3):
        by_theta = jax.grad(lambda t: loss(t, EPISODE.support)[0])(theta)
        theta = jax.tree.map(lambda t, g: t - 0.1 * g, theta, by_theta)
    found, metrics = meta_gradient(reptile, params, batch_of(EPISODE))
    expected = jax.tree.map(jnp.subtract, params.learner.params, theta)
    tiny.assert_close(found.learner.params, expected, atol=1e-6)
    right = loss(theta, EPISODE.query)[1].argmax(-1) == EPISODE.query.y
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)
    tiny.assert_equal(
        found.learner.stats, jax.tree.map(jnp.zeros_like, found.learner.stats)
    )


# -- ANIL ------------------------------------------------------------------------------


def test_anil_is_softmax_regression_on_fixed_features():
    """The body stays; the head takes gradient steps, here by hand in float64."""
    anil = algorithms.anil(NET, 0.3, num_steps=2, head="Dense_1")
    params = anil.init(jax.random.key(0), EPISODE)
    adapted = tiny.quick_jit(anil.adapt)(params, KEY, EPISODE.support)[0].params
    start = params.learner.params
    for name in ("Dense_0", "BatchNorm_0"):
        tiny.assert_equal(adapted[name], start[name])
    x, y = (np.asarray(a, np.float64) for a in EPISODE.support)
    first, norm = start["Dense_0"], start["BatchNorm_0"]
    hidden = x @ first["kernel"] + first["bias"]
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    features = np.tanh(hidden * norm["scale"] + norm["bias"])
    kernel, bias = (np.float64(start["Dense_1"][k]) for k in ("kernel", "bias"))
    for _ in range(2):
        scores = np.exp(features @ kernel + bias)
        error = scores / scores.sum(1, keepdims=True) - np.eye(tiny.WAY)[y.astype(int)]
        kernel = kernel - 0.3 * features.T @ error / len(y)
        bias = bias - 0.3 * error.mean(0)
    np.testing.assert_allclose(adapted["Dense_1"]["kernel"], kernel, rtol=1e-4)
    np.testing.assert_allclose(adapted["Dense_1"]["bias"], bias, atol=1e-6)


def test_anil_needs_parameters_called_head():
    with pytest.raises(ValueError, match=r"part='head' is in none of the paths"):
        algorithms.anil(NET).init(KEY, EPISODE)


# -- gradient agreement ----------------------------------------------------------------


def test_agreement_weights_by_hand():
    """w_i = sum_j g_i . g_j / sum_k |sum_j g_k . g_j|: here 6, 2 and -2 over 10."""
    grads = {"a": jnp.array([2.0, 0.5, -1.0]), "b": jnp.array([[1.0], [-0.5], [0.5]])}
    stacked = np.array([[2.0, 1.0], [0.5, -0.5], [-1.0, 0.5]])
    products = stacked @ stacked.T
    expected = products.sum(1) / np.abs(products.sum(1)).sum()
    np.testing.assert_allclose(agreement_weights(grads), expected, rtol=1e-6)
    assert expected[2] < 0 < expected[1]


def test_a_task_against_the_others_loses_its_say():
    maml = algorithms.maml(slope_learner(), RATE, num_steps=1)
    agreed = algorithms.gradient_agreement(maml)
    near, far = TASK, TASK._replace(query=(1.5, 4.0))
    both = batch_of(near.episode(), near.episode(), far.episode())
    each = []
    for task in (near, near, far):
        grads, _ = meta_gradient(maml, slope_params(), batch_of(task.episode()))
        each.append(float(grads.learner.params))
    grads, metrics = meta_gradient(agreed, slope_params(), both)
    products = np.array(each) * np.sum(each)
    weights = products / np.abs(products).sum()
    np.testing.assert_allclose(grads.learner.params, np.sum(weights * each), rtol=1e-5)
    np.testing.assert_allclose(metrics["tasks_against"], np.mean(weights < 0))
    assert metrics["tasks_against"] > 0


def test_agreement_refuses_what_has_no_gradients_to_weigh():
    with pytest.raises(ValueError, match=r"give it an algorithm that is meta-trained"):
        algorithms.gradient_agreement(algorithms.nearest_neighbour())
