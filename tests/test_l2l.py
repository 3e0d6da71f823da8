"""The L2L optimizer against a numpy transcription of the paper, float64, to 1e-6."""

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
STEPS, HIDDEN = 5, 3
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
CASES = {
    "published": {"num_layers": 2},
    "raw": {"num_layers": 1, "features": "raw", "output_scale": 1.0},
    "code": {"num_layers": 2, "output_scale": 0.01, "p": 5.0},
    "moments": {"num_layers": 1, "features": "moments", "shortcut": 0.2},
    "relative": {"num_layers": 1, "features": "moments", "relative": True},
}


@functools.cache
def make_task():
    """A faint first input, so that its gradients fall below e^-p and no other's do."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(6, NET.inputs)) * [1e-4, 1, 1]
    return rng.normal(size=NET.size), x, rng.integers(0, NET.classes, 6)


@functools.cache
def make_rule(case: str):
    rule = rules.l2l(hidden_size=HIDDEN, **CASES[case])
    params = rule.init(jax.random.key(0), ())
    rng = np.random.default_rng(1)
    return rule, jax.tree.map(lambda w: 0.5 * rng.normal(size=w.shape), params)


def published(case: str, weights) -> reference_optimizers.L2L:
    features = CASES[case].get("features", "log_sign")
    layers, width = [], {"raw": 1, "log_sign": 2, "moments": 6}[features]
    for k in range(CASES[case]["num_layers"]):
        layer = weights[f"lstm_{k}"]
        kernel = layer["kernel"]
        layers.append(
            reference.Lstm(kernel[:, :width], kernel[:, width:], layer["bias"])
        )
        width = HIDDEN
    return reference_optimizers.L2L(
        layers,
        weights["output"]["kernel"],
        weights["output"]["bias"],
        CASES[case].get("output_scale", 0.1),
        None if features == "raw" else CASES[case].get("p", 10.0),
        features == "moments",
        weights["shortcut"]["kernel"] if "shortcut" in weights else None,
        CASES[case].get("relative", False),
    )


def cross_entropy(params, x, y):
    outputs = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("case", CASES)
def test_a_full_unroll_and_its_meta_gradient_are_the_papers(case):
    """theta_t, losses, and the derivative of their sum with second ones dropped."""
    theta, x, y = make_task()
    rule, weights = make_rule(case)

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
        (loss, trace), grads = fn(weights)

    numpy_objective = NET.objective(x, y)
    thetas, losses, held = reference_optimizers.unroll_l2l(
        published(case, weights), theta, numpy_objective, STEPS
    )
    for t in range(STEPS):
        step = jax.tree.map(lambda leaf: leaf[t], trace.observed)  # noqa: B023
        np.testing.assert_allclose(flat(step), thetas[t], **TOLERANCE)
    np.testing.assert_allclose(trace.losses, losses, **TOLERANCE)
    np.testing.assert_allclose(loss, numpy_objective(thetas[-1])[0], **TOLERANCE)

    leaves, treedef = jax.tree.flatten(weights)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def last_loss(vector):
        parts = [
            part.reshape(leaf.shape)
            for part, leaf in zip(np.split(vector, sizes), leaves, strict=True)
        ]
        run = reference_optimizers.unroll_l2l(
            published(case, jax.tree.unflatten(treedef, parts)),
            theta,
            numpy_objective,
            STEPS,
            held=held,
        )
        return numpy_objective(run[0][-1])[0]

    numeric = reference.central_difference(last_loss, flat(weights), 1e-4)
    np.testing.assert_allclose(flat(grads), numeric, rtol=1e-6, atol=1e-9)


def test_it_starts_as_published():
    params = rules.l2l().init(jax.random.key(0), ())
    assert set(params) == {"lstm_0", "lstm_1", "output"}
    assert params["lstm_0"]["kernel"].shape == (80, 22)
    assert params["lstm_1"]["kernel"].shape == (80, 40)
    bias = np.asarray(params["lstm_1"]["bias"])
    np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], 20))
    spread = float(np.std(params["lstm_1"]["kernel"])) * 40**0.5
    assert 0.8 < spread < 0.95  # a normal cut at two deviations has 0.88


@pytest.mark.parametrize("relative", [False, True])
def test_a_shortcut_alone_is_adam_or_heavy_ball(relative):
    rule = rules.l2l(
        hidden_size=2,
        num_layers=1,
        output_scale=0.1,
        features="moments",
        shortcut=0.2,
        relative=relative,
    )
    params = rule.init(jax.random.key(0), ())
    params["output"] = jax.tree.map(jnp.zeros_like, params["output"])
    peer = optax.adam(0.02, b1=0.9, b2=0.98, eps=0.0)
    if relative:
        peer = optax.chain(optax.ema(0.9), optax.scale(-0.02))
    gradients = jax.random.normal(jax.random.key(1), (5, 7))
    tx = rule.bind(params)
    state, peer_state = tx.init(gradients[0]), peer.init(gradients[0])
    ours, theirs = tiny.quick_jit(tx.update), tiny.quick_jit(peer.update)
    for g in gradients:
        update, state = ours(g, state)
        expected, peer_state = theirs(g, peer_state)
        np.testing.assert_allclose(update, expected, rtol=2e-5, atol=1e-8)


def test_one_rule_serves_any_number_of_parameters():
    """Coordinates are alike: how they are grouped in tensors changes nothing."""
    rule, weights = make_rule("published")
    tx = rule.bind(weights)
    flat_updates, _ = tx.update(jnp.arange(6.0), tx.init(jnp.zeros(6)))
    nested = {"a": jnp.arange(4.0).reshape(2, 2), "b": [jnp.array([4.0, 5.0])]}
    updates, _ = tx.update(nested, tx.init(nested))
    np.testing.assert_allclose(flat(updates), flat_updates, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, r"hidden_size=0: choose 1 or more"),
        ({"num_layers": 0}, r"num_layers=0: choose 1 to 16"),
        ({"num_layers": 17}, r"num_layers=17: choose 1 to 16"),
        ({"features": "sign"}, r"features='sign': choose one of log_sign, raw"),
        ({"relative": True}, r"relative=True need features='moments', not 'log_sign'"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rules.l2l(**options)
