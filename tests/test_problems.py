"""Families of problems: one contract for all, and what each of them is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn

from metalstm.data import ImageData
from metalstm.learned_optimizers import problems, with_random_scaling

FAMILIES = {
    "quadratics": problems.quadratics(3),
    "uniform": problems.quadratics(3, distribution="uniform", init_std=0.01),
    "logistic": problems.logistic_regression(3, num_examples=8),
    "plateau": problems.plateau(3, num_examples=8),
    "sinusoids": problems.sinusoids(hidden=(4,), batch_size=3),
    "mlp": problems.mlp_classifier((4, 3), num_classes=3, batch_size=3),
    "conv": problems.conv_classifier(2, num_blocks=1, num_classes=3, batch_size=3),
    "scaled": with_random_scaling(problems.quadratics(3), 0.1, 10.0),
}
HAS_BATCHES = {"sinusoids", "mlp", "conv"}


@pytest.fixture(scope="module")
def data() -> ImageData:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 20)
    x = rng.integers(0, 80, (20, 4, 4, 1)) + 80 * y[:, None, None, None]
    return ImageData(jnp.asarray(x, jnp.uint8), jnp.asarray(y, jnp.int32))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name, data):
    """Functions of the key; vmap = loop; batches of any size; it can be minimised."""
    family = FAMILIES[name]
    sampler = problems.ProblemSampler(family, 2)
    adam = optax.adam(0.03)

    def one(key, data):
        draw = sampler.sample(key, data)
        batch = jax.tree.map(lambda leaf: leaf[0], draw.batches)
        value_and_grad = jax.value_and_grad(family.loss)

        def step(carry, _):
            params, state = carry
            loss, grads = value_and_grad(params, draw.task, batch)
            updates, state = adam.update(grads, state)
            return (optax.apply_updates(params, updates), state), (loss, grads)

        start = (draw.params, adam.init(draw.params))
        _, (losses, grads) = jax.lax.scan(step, start, length=60)
        return draw, losses, grads, family.batch(key, data, 5)

    keys = jax.random.split(jax.random.key(3), 2)
    draws, losses, grads, larger = tiny.quick_jit(jax.vmap(one, (0, None)))(keys, data)
    alone = sampler.sample(keys[1], data)
    tiny.assert_close(jax.tree.map(lambda leaf: leaf[1], draws), alone)
    first = jax.tree.map(lambda leaf: leaf[0], draws)
    assert tiny.max_difference(first, alone) > 1e-3
    assert losses.shape == (2, 60)
    assert np.isfinite(losses).all()
    assert (losses[:, -1] < losses[:, 0]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    leads = {leaf.shape[1] for leaf in jax.tree.leaves(draws.batches)}
    sizes = {leaf.shape[1] for leaf in jax.tree.leaves(larger)}
    assert (leads, sizes) == (({2}, {5}) if name in HAS_BATCHES else (set(), set()))
    if name in HAS_BATCHES:
        one, other = (
            jax.tree.map(lambda x, k=k: x[0, k], draws.batches) for k in (0, 1)
        )
        assert tiny.max_difference(one, other) > 0


def test_quadratics_are_the_papers():
    family = problems.quadratics(4, distribution="normal", init_std=0.5)
    task = family.sample(jax.random.key(0), None)
    theta = family.init(jax.random.key(1), task)["theta"]
    w, y = np.asarray(task["w"], np.float64), np.asarray(task["y"], np.float64)
    expected = np.sum((w @ np.asarray(theta, np.float64) - y) ** 2)
    np.testing.assert_allclose(family.loss({"theta": theta}, task, ()), expected, 1e-5)
    wide = problems.quadratics(200, init_std=0.5)
    task = wide.sample(jax.random.key(0), None)
    assert abs(float(task["w"].std()) - 1) < 0.02
    assert abs(float(wide.init(jax.random.key(0), task)["theta"].std()) - 0.5) < 0.1
    drawn = problems.quadratics(50, distribution="uniform").sample(jax.random.key(0), 0)
    assert 0 <= drawn["w"].min() < 0.01 < 0.99 < drawn["w"].max() <= 1


def test_the_mlp_is_a_sigmoid_layer_and_a_cross_entropy(data):
    family = problems.mlp_classifier((5,), num_classes=3, init_std=0.3, batch_size=4)
    task = family.sample(jax.random.key(0), data)
    params = family.init(jax.random.key(1), task)
    x, y = family.batch(jax.random.key(2), data)
    layers = [jax.tree.map(np.float64, layer) for layer in params.values()]
    inputs = np.float64(x).reshape(4, -1) / 255
    hidden = 1 / (1 + np.exp(-(inputs @ layers[0]["kernel"] + layers[0]["bias"])))
    logits = hidden @ layers[1]["kernel"] + layers[1]["bias"]
    picked = logits[np.arange(4), np.asarray(y)]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - picked)
    np.testing.assert_allclose(family.loss(params, task, (x, y)), expected, 1e-5)
    # biases too are drawn: published
    assert all(0.05 < leaf.std() < 0.8 for leaf in jax.tree.leaves(params))


def test_the_plateau_is_high_and_flat_and_shrinking_theta_leads_off_it():
    family = problems.plateau(10, steepness=(20.0, 20.0))

    def at(key, shrink):
        task = family.sample(key, None)
        theta = family.init(key, task)["theta"] * shrink
        loss, grad = jax.value_and_grad(family.loss)({"theta": theta}, task, ())
        return loss, jnp.abs(grad["theta"]).max()

    keys = jax.random.split(jax.random.key(0), 20)
    high, flat = jax.vmap(lambda key: at(key, 1.0))(keys)
    low, steep = jax.vmap(lambda key: at(key, 0.05))(keys)
    assert high.mean() > 0.8 > low.mean()
    assert flat.mean() < 0.03 < 0.08 < steep.mean()


def test_a_sinusoids_batch_serves_whichever_task_is_in_training():
    family = problems.sinusoids(hidden=(4,), batch_size=6)
    x = family.batch(jax.random.key(0), None)
    assert -5 <= x.min() < x.max() <= 5
    task = {"amplitude": jnp.float32(2), "phase": jnp.float32(0.5)}
    params = jax.tree.map(jnp.zeros_like, family.init(jax.random.key(1), task))
    expected = np.mean((2 * np.sin(np.asarray(x) - 0.5)) ** 2)
    np.testing.assert_allclose(family.loss(params, task, x), expected, rtol=1e-5)


@pytest.mark.parametrize("per", ["coordinate", "tensor", "problem"])
def test_scaling_changes_the_coordinates_and_not_the_problem(per):
    """L(phi) = L_0(c phi) and its gradient is c grad L_0; c is log-uniform."""
    plain = problems.logistic_regression(40)
    family = with_random_scaling(plain, 0.1, 10.0, per=per)
    task = family.sample(jax.random.key(0), None)
    phi = family.init(jax.random.key(1), task)
    theta = plain.init(jax.random.key(1), task.task)
    tiny.assert_close(jax.tree.map(jnp.multiply, phi, task.scales), theta)
    loss, grads = jax.value_and_grad(family.loss)(phi, task, ())
    expected, plain_grads = jax.value_and_grad(plain.loss)(theta, task.task, ())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    scaled = jax.tree.map(jnp.multiply, plain_grads, task.scales)
    tiny.assert_close(grads, scaled, rtol=1e-4)
    scales = task.scales["w"]
    assert scales.shape == ((40,) if per == "coordinate" else ())
    assert (scales == task.scales["bias"]).all() == (per == "problem")
    if per == "coordinate":
        assert 0.1 <= scales.min() < 0.3 < 3 < scales.max() <= 10
        assert abs(jnp.log(scales).mean()) < 0.6


def test_the_loss_is_scaled_too():
    plain = problems.logistic_regression(3)
    family = with_random_scaling(plain, 1, 1, per="problem", loss=(0.01, 100.0))
    scales = []
    for seed in range(20):
        task = family.sample(jax.random.key(seed), None)
        phi = family.init(jax.random.key(1), task)
        ratio = family.loss(phi, task, ()) / plain.loss(phi, task.task, ())
        np.testing.assert_allclose(ratio, task.loss_scale, rtol=1e-5)
        scales.append(float(ratio))
    assert 0.01 <= min(scales) < 0.1 < 10 < max(scales) <= 100


class Regressor(nn.Module):
    """A reader's own model, with a batch norm."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(jnp.tanh(x))


def test_any_flax_model_with_any_loss_is_a_problem():
    x = jax.random.normal(jax.random.key(0), (30, 3))
    data = ImageData(x, x[:, :2] ** 2)

    def absolute(outputs, targets):
        return jnp.abs(outputs - targets).mean()

    family = problems.supervised(Regressor(), absolute, batch_size=8)
    draw = problems.ProblemSampler(family, 1).sample(jax.random.key(1), data)
    batch = jax.tree.map(lambda leaf: leaf[0], draw.batches)
    variables = {"params": draw.params, "batch_stats": draw.task.state.stats}
    outputs, _ = Regressor().apply(variables, batch[0], True, mutable=["batch_stats"])
    loss = family.loss(draw.params, draw.task, batch)
    np.testing.assert_allclose(loss, absolute(outputs, batch[1]), rtol=1e-6)
    squared = problems.supervised(Regressor())  # float targets: the squared error
    loss = squared.loss(draw.params, draw.task, batch)
    np.testing.assert_allclose(loss, np.mean((outputs - batch[1]) ** 2), rtol=1e-5)
    # examples come with their own targets
    np.testing.assert_allclose(batch[1], batch[0][:, :2] ** 2, rtol=1e-6)


def test_init_std_none_is_the_models_own_start(data):
    family = problems.mlp_classifier((50,), num_classes=3, init_std=None)
    params = family.init(jax.random.key(0), family.sample(jax.random.key(0), data))
    assert abs(params["dense1"]["kernel"].std() - 0.25) < 0.03  # 1 / sqrt(16)
    assert np.all(params["dense1"]["bias"] == 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: problems.quadratics(0), r"dim=0: choose a number above 0"),
        (
            lambda: problems.quadratics(init_std=0),
            r"init_std=0: choose a num",
        ),
        (
            lambda: problems.quadratics(distribution="x"),
            r"distribution='x': choose",
        ),
        (lambda: problems.logistic_regression(num_examples=0), r"num_examples=0: ch"),
        (lambda: problems.plateau(steepness=(3, 2)), r"steepness=\(3, 2\): give 0 < l"),
        (lambda: problems.sinusoids(batch_size=0), r"batch_size=0: choose"),
        (lambda: problems.mlp_classifier(batch_size=0), r"batch_size=0: choose"),
        (lambda: problems.mlp_classifier(activation="x"), r"activation='x': choose on"),
        (
            lambda: with_random_scaling(problems.quadratics(), 0, 1),
            r"low, high=\(0, 1\): give 0 < low <= high",
        ),
        (
            lambda: with_random_scaling(problems.quadratics(), 1, 2, per="x"),
            r"per='x': choose one of coordinate, tensor",
        ),
        (
            lambda: problems.ProblemSampler(problems.quadratics(), 0),
            r"num_batches=0: choose 1 or more",
        ),
    ],
)
def test_wrong_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
