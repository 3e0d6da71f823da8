"""The gradient memory is the optimizers it says; v2 is its transcription, to 1e-6."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_optimizers
import tiny

from metalstm import rules
from metalstm.inner import first_order, unroll

NET = reference.TanhNet()
STEPS, HIDDEN = 4, 3
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
HEADS = ("forget", "input", "decay", "exponent", "scale")
NEVER, ALWAYS = -100.0, 100.0  # logits whose sigmoid is 0 and 1
RATE = 0.05


def logit(x: float) -> float:
    return float(np.log(x / (1 - x)))


# -- hand-designed optimizers are special cases ----------------------------------------

OPTIMIZERS = {
    "sgd": (
        optax.sgd(RATE),
        {"forget": NEVER, "input": ALWAYS, "decay": 0.0, "exponent": NEVER},
    ),
    "momentum": (
        optax.sgd(RATE, momentum=0.9),
        {"forget": logit(0.9), "input": ALWAYS, "decay": 0.0, "exponent": NEVER},
    ),
    "rmsprop": (
        optax.rmsprop(RATE, decay=0.95),
        {"forget": NEVER, "input": ALWAYS, "decay": logit(0.95), "exponent": ALWAYS},
    ),
}


def trajectory(tx, steps: int = 30):
    target = jnp.linspace(-3, 3, 16)

    def step(carry, _):
        theta, state = carry
        g = jax.grad(lambda t: jnp.sum(jnp.cosh(t - target) / 9))(theta)
        updates, state = tx.update(g, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    start = jnp.ones(16)
    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("hidden_size", [1, 4])
def test_biases_alone_make_the_hand_designed_optimizer(name, hidden_size):
    theirs, biases = OPTIMIZERS[name]
    rule = rules.gradient_memory(hidden_size=hidden_size)
    weights = rule.init(jax.random.key(0), ())
    for head, bias in {**biases, "scale": float(np.log(RATE))}.items():
        weights[head] = {"kernel": jnp.zeros(hidden_size), "bias": bias}
    with jax.enable_x64(True):
        ours = trajectory(optax.chain(rule.bind(weights), optax.scale(-1.0)))
        expected = np.asarray(trajectory(theirs))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)
    assert np.max(np.abs(expected - 1)) > 0.5


def test_it_starts_as_momentum_over_rms():
    """Within the reach of its small kernels: a normalised, smoothed gradient."""
    rule = rules.gradient_memory()
    params = jnp.zeros(3)
    tx = rule.bind(rule.init(jax.random.key(0), params))
    state, sizes = tx.init(params), []
    for _ in range(300):
        m, state = tx.update(jnp.array([1e-3, -1.0, 50.0]), state, params)
        sizes.append(np.abs(m))
    np.testing.assert_array_equal(np.sign(m), [1, -1, 1])
    assert np.all(np.abs(m) > 0.6)
    assert np.all(np.abs(m) < 1.6)
    assert np.max(sizes) < 4  # also while v, which starts at 0, fills up
    fixed = rules.gradient_memory(init_scale=0.0).init(jax.random.key(0), ())
    assert all(np.all(fixed[head]["kernel"] == 0) for head in HEADS)


def test_the_gradients_start_is_nearly_the_gradient():
    rule = rules.gradient_memory(start="gradient")
    tx = rule.bind(rule.init(jax.random.key(0), ()))
    g = jnp.array([1e-4, -0.01, 1.0])
    state = tx.init(g)
    for _ in range(10):
        m, state = tx.update(g, state)
        np.testing.assert_allclose(m, g, rtol=0.05)
    with pytest.raises(ValueError, match="start='sgd': choose one of adam, gradient"):
        rules.gradient_memory(start="sgd")


def test_no_second_derivative_flows_through_its_features():
    """With gamma = 0, m = e^s i_c g: the slope is m / g unless s and i_c move too."""
    rule = rules.gradient_memory(hidden_size=2, init_scale=3.0)
    weights = rule.init(jax.random.key(0), ())
    weights["exponent"] = {"kernel": jnp.zeros(2), "bias": jnp.float32(NEVER)}
    tx = rule.bind(weights)

    def memory(g):
        return tx.update(g, tx.init(g))[0]

    m, slope = jax.value_and_grad(memory)(jnp.float32(0.02))
    np.testing.assert_allclose(slope, m / 0.02, rtol=1e-5)


# -- two layers ------------------------------------------------------------------------


@functools.cache
def make_task():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, NET.inputs))
    return rng.normal(size=NET.size), x, rng.integers(0, NET.classes, 6)


@functools.cache
def make_rule(gates_hidden: int):
    """Weights large enough that everything matters."""
    rule = rules.two_layer(
        memory={"hidden_size": HIDDEN}, gates={"hidden_size": gates_hidden}
    )
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda w: 0.3 * rng.normal(size=w.shape), rule.init(jax.random.key(0), ())
    )
    weights[1]["forget"]["bias"] += 3.0
    weights[1]["input"]["bias"] -= 2.0
    return rule, weights


def published(weights):
    memory, gates = weights
    lstm = memory["lstm"]
    memory = reference_optimizers.Memory(
        reference.Lstm(lstm["kernel"][:, :2], lstm["kernel"][:, 2:], lstm["bias"]),
        np.stack([memory[head]["kernel"] for head in HEADS]),
        np.stack([memory[head]["bias"] for head in HEADS]),
    )
    lstm = None
    if "lstm" in gates:
        kernel = gates["lstm"]["kernel"]  # reads [m 2, hidden]
        inputs = np.hstack([gates["lstm"]["loss_kernel"], kernel[:, :2]])
        lstm = reference.Lstm(inputs, kernel[:, 2:], gates["lstm"]["bias"])
    made = [
        reference.Gate(w["features"], w["theta"], w["carry"], w["bias"])
        for w in (gates["forget"], gates["input"])
    ]
    return memory, reference.MetaLstm(lstm, *made)


def cross_entropy(params, x, y):
    outputs = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("gates_hidden", [0, 2])
def test_a_full_unroll_of_v2_and_its_meta_gradient_are_the_equations(gates_hidden):
    """theta_t, and the derivative of the last loss with second ones dropped."""
    theta, x, y = make_task()
    rule, weights = make_rule(gates_hidden)

    def objective(weights):
        final, trace = unroll(
            lambda params, stats, batch, key: (cross_entropy(params, x, y), stats),
            rule,
            weights,
            NET.unpack(theta),
            num_steps=STEPS,
            differentiation=first_order(),
            observe=lambda state: state.params,
        )
        return cross_entropy(final.params, x, y), trace

    with jax.enable_x64(True):
        fn = tiny.quick_jit(jax.value_and_grad(objective, has_aux=True))
        (_, trace), grads = fn(weights)

    numpy_objective = NET.objective(x, y)
    thetas, held = reference_optimizers.unroll_two_layer(
        *published(weights), theta, numpy_objective, STEPS
    )
    for t in range(STEPS):
        step = jax.tree.map(lambda leaf: leaf[t], trace.observed)  # noqa: B023
        np.testing.assert_allclose(flat(step), thetas[t], **TOLERANCE)

    leaves, treedef = jax.tree.flatten(weights)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def last_loss(vector):
        parts = [
            part.reshape(leaf.shape)
            for part, leaf in zip(np.split(vector, sizes), leaves, strict=True)
        ]
        run = reference_optimizers.unroll_two_layer(
            *published(jax.tree.unflatten(treedef, parts)),
            theta,
            numpy_objective,
            STEPS,
            held=held,
        )
        return numpy_objective(run[0][-1])[0]

    numeric = reference.central_difference(last_loss, flat(weights), 1e-4)
    np.testing.assert_allclose(flat(grads), numeric, rtol=2e-6, atol=1e-9)


def test_two_layer_is_the_chain_and_has_no_second_lstm_unless_asked():
    rule, weights = make_rule(0)
    parts = (
        rules.gradient_memory(hidden_size=HIDDEN),
        rules.lstm_gates(hidden_size=0, feature_gradient="full"),
    )
    params, g = jnp.linspace(-1, 1, 5), jnp.linspace(1, -2, 5)
    by_hand = optax.chain(*(r.bind(w) for r, w in zip(parts, weights, strict=True)))
    tx = rule.bind(weights)
    expected, _ = by_hand.update(g, by_hand.init(params), params, value=0.7)
    updates, _ = tx.update(g, tx.init(params), params, value=0.7)
    np.testing.assert_array_equal(updates, expected)
    assert "lstm" not in weights[1]
    assert "lstm" in make_rule(2)[1][1]
    assert rules.two_layer().traits.reads_loss
    blind = rules.two_layer(gates={"loss_input": False})
    assert not blind.traits.reads_loss


def test_the_memory_learns_through_the_features_of_the_gates():
    """With i's weight on theta's step closed, features are the only way to the loss."""
    g, params = jnp.array([0.3, -0.8]), jnp.ones(2)

    def memory_gradient(**gates):
        rule = rules.two_layer(memory={"hidden_size": 2}, gates=gates)
        weights = rule.init(jax.random.key(0), params)
        weights[1]["input"]["bias"] = jnp.float32(-60.0)

        def theta(memory):
            tx = rule.bind((memory, weights[1]))
            return tx.update(g, tx.init(params), params, value=1.0)[0].sum()

        return np.abs(flat(jax.grad(theta)(weights[0]))).max()

    assert memory_gradient() > 1e-6
    assert memory_gradient(feature_gradient="stopped") < 1e-20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size=0: choose 1 or more"),
        ({"eps": 0.0}, r"eps=0.0: choose a number above 0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rules.gradient_memory(**options)
