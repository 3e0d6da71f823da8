"""Bound rules in other people's training loops: optax, flax's TrainState, NNX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen, nnx
from flax.training.train_state import TrainState

from metalstm import rules

STEPS = 4
GATES = {"hidden_size": 2, "loss_input": False}
RULES = {  # those that do without the loss, which TrainState does not pass on
    "l2l": rules.l2l(hidden_size=3),
    "memory": rules.chain(rules.gradient_memory(hidden_size=3), optax.scale(-0.05)),
    "two_layer": rules.two_layer(
        memory={"hidden_size": 3}, gates={"loss_input": False}
    ),
    "gates": rules.lstm_gates(**GATES),
    "moment_gates": rules.moment_gates(hidden_size=2),
    "moment_lstm": rules.moment_lstm(hidden_size=2, orthogonal=True),
    "by_group": rules.by_group(
        {"matrix": rules.l2l(hidden_size=2), "vector": rules.lstm_gates(**GATES)},
        rules.matrix_or_vector,
    ),
}
X = jnp.linspace(-1, 1, 12).reshape(4, 3)
Y = jnp.sin(X.sum(1, keepdims=True))


@functools.cache
def transform(name: str):
    """Between clipping, a decoupled weight decay and a schedule, as in real use."""
    rule = RULES[name]
    weights = rule.init(jax.random.key(0), {"kernel": jnp.zeros((3, 1))})
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        rule.bind(weights),
        optax.add_decayed_weights(-0.01),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, STEPS + 1)),
    )


def start() -> dict:
    return {
        "kernel": jnp.array([[0.3], [-0.2], [0.5]]),
        "bias": jnp.array([0.1]),
    }


def loss_of(params):
    return jnp.mean((X @ params["kernel"] + params["bias"] - Y) ** 2)


@functools.cache
def by_hand(name: str):
    """The plain optax loop that the others have to agree with."""
    tx = transform(name)

    @tiny.quick_jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = start()
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("name", RULES)
def test_train_state(name):
    model = linen.Dense(1)
    state = TrainState.create(apply_fn=model.apply, params=start(), tx=transform(name))

    @tiny.quick_jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    tiny.assert_close(state.params, by_hand(name))
    assert tiny.max_difference(state.params, start()) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_nnx_optimizer(name):
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = start()["kernel"], start()["bias"]
    optimizer = nnx.Optimizer(model, transform(name), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads, value=loss)

    for _ in range(STEPS):
        step(model, optimizer)
    tiny.assert_close(
        {"kernel": model.kernel[...], "bias": model.bias[...]}, by_hand(name)
    )


def test_nnx_passes_the_loss_on_to_rules_that_read_it():
    rule = rules.lstm_gates(hidden_size=2)
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = rule.bind(rule.init(jax.random.key(0), ()))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model)
    optimizer.update(model, grads, value=jnp.float32(1.0))
    with pytest.raises(ValueError, match="needs the loss"):
        optimizer.update(model, grads)


@pytest.mark.parametrize("name", RULES)
def test_parameters_of_any_nesting_and_dtype(name):
    """Lists, tuples, None, scalars, bfloat16: the same structure and dtypes back."""
    params = {
        "layers": [(jnp.ones((2, 2), jnp.bfloat16), None), {"deep": jnp.ones(3)}],
        "half": jnp.ones(2, jnp.float16),
        "scalar": jnp.float32(1.0),
        "empty": jnp.zeros((0, 3)),
    }
    tx = transform(name)

    @tiny.quick_jit
    def step(params, state):
        grads = jax.tree.map(lambda p: (0.1 * p).astype(p.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    out, state = step(*step(params, tx.init(params)))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert kinds(out) == kinds(params)
    for leaf in jax.tree.leaves(out):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
    assert out["scalar"] != 1
    all_half = transform(name).init({"kernel": jnp.ones((2, 2), jnp.bfloat16)})
    for leaf in jax.tree.leaves((state, all_half)):
        assert leaf.dtype in (jnp.float32, jnp.int32)


# -- a float32 copy --------------------------------------------------------------------


def test_a_float_copy_adds_up_what_bfloat16_loses():
    params = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(2)}
    grads = jax.tree.map(jnp.ones_like, params)

    def descend(tx):
        out, state = params, tx.init(params)
        for _ in range(20):
            updates, state = tx.update(grads, state, out)
            out = optax.apply_updates(out, updates)
        return out, state

    lost, _ = descend(optax.sgd(1e-3))
    np.testing.assert_array_equal(np.asarray(lost["w"], np.float32), 1)
    kept, state = descend(rules.with_float_copy(optax.sgd(1e-3)))
    assert kept["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept["w"], jnp.bfloat16(0.98))
    np.testing.assert_allclose(state.copy["w"], 0.98, rtol=1e-5)
    np.testing.assert_allclose(kept["v"], lost["v"], rtol=1e-6)


def test_a_float_copy_lets_a_rule_see_what_it_sees_in_float32():
    tx = transform("two_layer")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    full = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    copied = rules.with_float_copy(tx)
    state, plain = copied.init(half), tx.init(full)
    for k in range(3):
        grads = jax.tree.map(lambda p: jnp.bfloat16(0.3) * (k + p), half)  # noqa: B023
        change, state = copied.update(grads, state, half, value=1.0)
        half = optax.apply_updates(half, change)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, plain = tx.update(wide, plain, full, value=1.0)
        full = optax.apply_updates(full, updates)
        tiny.assert_equal(state.copy, full)
        tiny.assert_equal(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), full))
    with pytest.raises(ValueError, match="with_float_copy needs the parameters"):
        copied.update(half, state)
