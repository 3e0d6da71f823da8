"""What the rules for ordinary training share, and the LSTM among them."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_optimizers as reference
import tiny
from reference import Lstm

from metalstm import rules

PARAMS = {
    "kernel": jnp.linspace(-1, 2, 12).reshape(4, 3),
    "bias": jnp.array([0.3, -0.1, 0.2]),
}
MAKERS = {
    "gates": rules.moment_gates,
    "lstm": rules.moment_lstm,
    "network": rules.moment_network,
}


def random_weights(rule, seed: int = 0):
    weights = rule.init(jax.random.key(seed), PARAMS)
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    rows = zip(keys, leaves, strict=True)
    moved = [w + 0.3 * jax.random.normal(k, w.shape) for k, w in rows]
    return jax.tree.unflatten(treedef, moved)


def gradients(step: int):
    return jax.tree.map(lambda p: jnp.sin(3 * p + step), PARAMS)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_the_lstms_update_is_the_equations_of_the_docstring(num_steps):
    """Against numpy float64, tensor by tensor, over three updates."""
    rule = rules.moment_lstm(hidden_size=3)
    weights = random_weights(rule)
    tx = rules.with_progress(rule.bind(weights), num_steps)
    params, state = PARAMS, tx.init(PARAMS)
    w = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    kernel = w["lstm"]["kernel"]
    wanted_rule = reference.MomentLstm(
        Lstm(kernel[:, :6], kernel[:, 6:], w["lstm"]["bias"]),
        w["tensor"]["kernel"],
        w["output"]["kernel"],
        w["shortcut"]["kernel"],
        (w["step"]["kernel"], w["step"]["bias"]),
    )
    wanted = {name: np.asarray(p, np.float64) for name, p in PARAMS.items()}
    states = {}
    for name, p in wanted.items():
        zeros = np.zeros((p.size, 3))
        moments = reference.Moments(0, (0 * p, 0 * p, 0 * p), 0 * p)
        states[name] = (moments, zeros, zeros)
    update = tiny.quick_jit(tx.update)
    for step in range(3):
        grads = gradients(step)
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name in wanted:
            wanted[name], states[name] = reference.moment_lstm_step(
                wanted_rule,
                wanted[name],
                np.asarray(grads[name], np.float64),
                states[name],
                None if num_steps is None else step / num_steps,
                num_steps,
            )
        tiny.assert_close(params, wanted, rtol=2e-5, atol=5e-6)
    assert tiny.max_difference(params, PARAMS) > 1e-3
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state.inner))
    assert sizes == 1 + (4 + 2 * 3) * 15


def test_without_normalising_an_update_is_as_long_as_its_gradients_are_consistent():
    """Noise of mean zero has shorter updates than a constant gradient; else equal."""
    rms = {}
    for normalise in (True, False):
        rule = rules.moment_gates(hidden_size=2, normalise=normalise)
        tx = rule.bind(rule.init(jax.random.key(0), ()))
        params = {"a": jnp.zeros(500)}
        for name, noise in (("constant", 0.0), ("noise", 1.0)):
            state = tx.init(params)
            for step in range(30):
                drawn = jax.random.normal(jax.random.key(step), (500,))
                grads = {"a": noise * drawn + (1 - noise)}
                update, state = tx.update(grads, state, params)
            rms[normalise, name] = reference.rms(np.asarray(update["a"]))
    assert rms[False, "constant"] == pytest.approx(rms[True, "constant"], rel=0.1)
    assert rms[False, "noise"] < 0.5 * rms[True, "noise"]
    with pytest.raises(ValueError, match="orthogonal=True, normalise=False"):
        rules.moment_gates(orthogonal=True, normalise=False)


@pytest.mark.parametrize("name", MAKERS)
def test_orthogonal_updates_have_the_singular_vectors_of_the_others(name):
    """And values as equal as Muon's five iterations make them."""
    plain, orthogonal = (MAKERS[name](hidden_size=3, orthogonal=o) for o in (0, 1))
    weights = random_weights(plain)
    if name == "gates":  # no decay, which is not orthogonalised
        weights["output"]["kernel"] = weights["output"]["kernel"].at[-1].set(0)
        weights["output"]["bias"] = weights["output"]["bias"].at[-1].set(-80)
    params = PARAMS | {"conv": jnp.linspace(-2, 1, 48).reshape(2, 2, 3, 4)}
    grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    both = []
    for rule in (plain, orthogonal):
        tx = rule.bind(weights)
        both.append(tx.update(grads, tx.init(params), params)[0])
    np.testing.assert_array_equal(both[0]["bias"], both[1]["bias"])
    for key, shape in {"kernel": (4, 3), "conv": (12, 4)}.items():
        before, after = (np.asarray(x[key], np.float64).reshape(shape) for x in both)
        assert reference.rms(after) == pytest.approx(reference.rms(before), rel=0.35)
        left, values, right = np.linalg.svd(before, full_matrices=False)
        rotated = left.T @ after @ right.T
        np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-5)
        assert values.max() / values.min() > 2
        assert np.diag(rotated).max() / np.diag(rotated).min() < 2


def test_a_gradient_that_is_not_finite_does_not_reach_the_lstm():
    rule = rules.moment_lstm(hidden_size=2)
    tx = rule.bind(random_weights(rule))
    update = tiny.quick_jit(tx.update)
    _, state = update(gradients(0), tx.init(PARAMS), PARAMS)
    broken = gradients(1) | {"bias": jnp.array([0.0, np.nan, 0.0])}
    updates, after = update(broken, state, PARAMS)
    tiny.assert_equal(after, state)
    tiny.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize("name", ["lstm", "network"])
def test_a_tensor_whose_gradient_is_zero_does_not_move(name):
    """Nor does a mask so large that its rms is infinite make a number infinite."""
    rule = MAKERS[name](hidden_size=2)
    largest = jnp.array([0.0, jnp.finfo(jnp.float32).min])
    params = PARAMS | {"frozen": jnp.ones((4, 3)), "mask": largest}
    still = {"frozen": jnp.zeros((4, 3)), "mask": jnp.zeros(2)}
    for weights in (rule.init(jax.random.key(0), params), random_weights(rule)):
        tx = rule.bind(weights)
        update, state = tiny.quick_jit(tx.update), tx.init(params)
        for step in range(3):
            updates, state = update(gradients(step) | still, state, params)
        tiny.assert_equal({k: updates[k] for k in still}, still)
        assert np.abs(updates["kernel"]).max() > 1e-4
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", MAKERS)
def test_a_parameter_may_be_a_number_and_must_have_a_gradient(name):
    tx = MAKERS[name](hidden_size=2).bind(MAKERS[name](hidden_size=2).init(
        jax.random.key(0), PARAMS
    ))  # fmt: skip
    number = {"w": 2.0}
    updates, _ = tx.update({"w": 1.0}, tx.init(number), number)
    assert updates["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match="1 gradients of 2 parameters: give each"):
        tx.update(PARAMS | {"bias": None}, tx.init(PARAMS), PARAMS)


LEAN = """
import sys
from importlib import metadata
needed = {"jax", "jaxlib", "optax", "numpy", "scipy", "opt_einsum", "metalstm"}
needed |= {name.replace("_", "-") for name in needed} | {"ml_dtypes", "absl-py"}
for name, owners in metadata.packages_distributions().items():
    if not needed & set(owners):
        sys.modules[name] = None  # importing it is an error
import jax.numpy as jnp, metalstm
tx = metalstm.pretrained_optimizer("mine", num_steps=3, directory=sys.argv[1])
params = {"w": jnp.ones((2, 3))}
updates, _ = tx.update(params, tx.init(params), params)
assert 0 < abs(updates["w"]).max() < 1
try:
    metalstm.algorithms
except ImportError as error:
    assert "needs flax: pip install flax" in str(error), error
else:
    raise AssertionError
"""


def test_jax_optax_and_numpy_are_enough_for_a_trained_rule(tmp_path):
    rule = rules.moment_gates()
    weights = rule.init(jax.random.key(0), PARAMS)
    path = rules.save_rule(tmp_path / "mine.npz", {"rule": "moment_gates"}, weights)
    assert path.stat().st_size < 100_000
    subprocess.run([sys.executable, "-c", LEAN, str(tmp_path)], check=True)


def test_shipped_rules_are_small():
    files = list((Path(rules.__file__).parent / "shipped").glob("*.npz"))
    assert files
    assert max(path.stat().st_size for path in files) < 100_000


@pytest.mark.parametrize(
    "make", [*MAKERS.values(), functools.partial(rules.l2l, features="moments")]
)
def test_parameters_are_float32_under_x64_too(make):
    with jax.enable_x64(True):
        weights = make().init(jax.random.key(0), PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype("float32")}
